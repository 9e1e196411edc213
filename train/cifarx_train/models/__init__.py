"""Model architectures. Importing this package registers the built-in ones, each in a module of its own."""

from cifarx_train.models import fastnet, lzh

__all__ = ["fastnet", "lzh"]
