"""Run ONNX files with ONNX Runtime Web, whose WebAssembly runs in a Node.js process here and in browsers elsewhere."""
