"""Legacy checkpoints: files that `torch.save` wrote without cifarx, read without running any code in them."""
