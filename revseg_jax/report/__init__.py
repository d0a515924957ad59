"""The report of a run: one HTML file with its result, its curves and chains to read; and several runs side by side."""

from revseg_jax.report.html import main, write_comparison, write_report

__all__ = ["main", "write_comparison", "write_report"]
