"""What TensorBoard shows of a run: curves, pictures, the graph, the settings."""
