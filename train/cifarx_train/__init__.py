"""Training: models, data, recipes, the loop, checkpoints."""
