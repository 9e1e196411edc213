"""Callbacks: what happens on the events of a training run."""
