"""Runs => a report: comparisons with their uncertainty, figures, and the paper's tables."""
