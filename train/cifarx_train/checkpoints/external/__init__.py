"""External checkpoints: files that other programs wrote, read without running any code in them."""
