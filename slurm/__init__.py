"""SLURM jobs: `ifvit submit` submits jobs, supervises them and shows their state."""
