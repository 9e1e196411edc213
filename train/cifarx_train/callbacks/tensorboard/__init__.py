"""The TensorBoard callback and the images it logs."""
