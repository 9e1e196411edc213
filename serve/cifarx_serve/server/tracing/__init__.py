"""Traces of requests with OpenTelemetry, whose libraries only `tracer` imports, if traces are recorded."""
