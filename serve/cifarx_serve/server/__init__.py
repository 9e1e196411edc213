"""The inference server: HTTP, batching and worker processes."""
