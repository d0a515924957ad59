"""The paper's ablations in small: which runs they are made of, and what came out beside the paper's numbers."""
