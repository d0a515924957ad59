"""The report of a run: one HTML file with its result, its curves and chains to read."""

from revseg_jax.report.html import main, write_report

__all__ = ["main", "write_report"]
