"""Networks of PyTorch from ONNX models, for the formats that are made from PyTorch."""
