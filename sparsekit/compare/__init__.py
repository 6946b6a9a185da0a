"""Comparisons: one file describes many runs under one protocol, and one report shows their results."""
