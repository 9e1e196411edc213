"""Backends that run the files of PyTorch."""
