"""What rules run: `lorasweep job WORD`, a module for each word."""
