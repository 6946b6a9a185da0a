"""Standardised comparisons: one file in, many runs under one protocol, one report out."""
