"""The command `lorasweep`: a module for each of its words."""
