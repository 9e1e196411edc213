"""The runtime: runs the artifacts, and needs no PyTorch to do so."""
