"""Conversion to ONNX, and transformations of ONNX graphs."""
