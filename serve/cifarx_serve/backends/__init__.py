"""Backends: one runtime each, which opens model files and runs them."""
