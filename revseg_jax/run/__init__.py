"""What a run keeps and how it is stopped and goes on: its folder, manifest, checkpoints and numbers."""
