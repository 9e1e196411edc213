"""The models of a server: repository, batcher and metrics."""
