"""Callbacks that report the progress of training."""
