"""Reports of runs: comparisons with their noise, figures, and the paper's tables."""
