"""Static int8 quantization of ONNX models."""
