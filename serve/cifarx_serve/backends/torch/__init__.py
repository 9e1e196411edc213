"""Backends that run PyTorch's own file formats."""
