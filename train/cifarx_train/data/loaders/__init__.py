"""Loaders: batches from device memory or streamed from the host."""
