"""The parity check: whether an artifact answers as its reference."""
