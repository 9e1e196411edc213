"""Compare two networks layer by layer."""
