"""LiteRT files, `.tflite`."""
