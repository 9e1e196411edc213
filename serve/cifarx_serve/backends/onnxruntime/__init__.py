"""ONNX Runtime on the CPU, CUDA and TensorRT."""
