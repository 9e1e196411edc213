"""The ONNX Runtime backend, for the CPU, CUDA and TensorRT."""
