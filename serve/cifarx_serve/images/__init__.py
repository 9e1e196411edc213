"""Finding, decoding and preprocessing images."""
