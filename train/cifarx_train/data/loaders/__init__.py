"""Loaders, which form batches on the training device from images in its memory or streamed from the host."""
