"""The TensorBoard callback and its images."""
