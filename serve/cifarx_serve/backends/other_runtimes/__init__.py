"""Run ONNX files in the runtimes of others, to check how these answer. No command selects them for a file by itself."""
