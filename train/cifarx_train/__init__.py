"""Training: models, data, recipes, the loop, checkpoints."""

from cifarx_serve.backends.registry import register_backend

# The entry point says the same where cifarx is installed; in a source tree there are no entry points.
register_backend("pytorch", "cifarx_train.pytorch_backend:PyTorchBackend", (".pth",))
