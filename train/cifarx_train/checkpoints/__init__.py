"""Saving, loading and resuming from checkpoints."""
