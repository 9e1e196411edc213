"""Latency and throughput measurements, one process per file."""
