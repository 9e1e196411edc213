"""Conversion to ONNX, and what is done to the graph afterwards."""
