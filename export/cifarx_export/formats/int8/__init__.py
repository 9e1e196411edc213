"""Static int8 quantization: what the formats have in common."""
