"""Checkpoints: saving, loading and resuming."""
