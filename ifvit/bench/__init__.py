"""Benchmarks: each verb `ifvit bench …` prints speeds and ratios that are measured in one run."""
