"""Training: models, data, recipes, the training loop and checkpoints."""

from cifarx_serve.backends.registry import register_backend

# An installed cifarx finds this backend by its entry point. A source tree has no entry points.
register_backend("pytorch", "cifarx_train.pytorch_backend:PyTorchBackend", (".pth",))
