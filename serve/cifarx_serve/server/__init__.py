"""The HTTP server: model files over the network, batched, with no PyTorch to run an ONNX model."""
