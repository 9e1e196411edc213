"""Legacy checkpoints: files of `torch.save`, read without running their code."""
