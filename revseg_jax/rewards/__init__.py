"""Rewards of a chain, each in [0, 1]: format, temporal, spatial, mask; and their weighted sum. NumPy only."""
