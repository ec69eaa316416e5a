"""What all packages share and what knows nothing of the sweep: errors, files, formats, SLURM."""
