"""Scores of predicted masks: J, F and J&F, and the protocols of the benchmarks."""
