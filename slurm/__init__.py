"""SLURM jobs: `ifvit submit` submits, supervises and shows them."""
