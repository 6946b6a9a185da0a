"""The report of a comparison: its records as numbers, tables, figures, sentences and files."""

from sparsekit.report.write import write_report

__all__ = ["write_report"]
