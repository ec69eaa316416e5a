"""The command `lorasweep`: one module per subcommand."""
