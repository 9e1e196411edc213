"""Check that an artifact returns the logits of its reference, and report the result."""
