"""The runtime: runs artifacts and serves them over HTTP, without PyTorch."""
