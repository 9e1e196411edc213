"""One module a network of our own; importing this package registers them all. torchvision's are in one module."""

from cifarx_train.models import fastnet, lzh

__all__ = ["fastnet", "lzh"]
