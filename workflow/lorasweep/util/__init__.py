"""Helpers shared by all packages and independent of the sweep: errors, files, formats, SLURM."""
