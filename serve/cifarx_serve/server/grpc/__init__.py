"""The Open Inference Protocol over gRPC, with the standard health and reflection services."""
