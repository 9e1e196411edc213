"""Resizing of uint8 images with ONNX nodes, with the results of `cifarx_serve.images.preprocess.resize`.

The modules return text in the syntax of ONNX, https://github.com/onnx/onnx/blob/main/docs/Syntax.md. The names of sizes
and positions start with their axis, `height` or `width`. The names of all values are part of the file: changing one
changes the bytes of an artifact.
"""
