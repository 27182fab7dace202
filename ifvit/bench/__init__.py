"""Speed, measured: each benchmark is a command that prints ratios of one run."""
