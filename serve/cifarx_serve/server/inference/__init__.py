"""Inference: the models of a server, their batching queues and their metrics. Knows nothing about HTTP."""
