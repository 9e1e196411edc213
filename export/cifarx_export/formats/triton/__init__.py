"""Model repositories for the Triton Inference Server and KServe."""
