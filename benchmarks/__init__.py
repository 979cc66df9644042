"""Figures that are printed, not asserted; how to get them stands in README.md."""
