"""One module a network; importing this package registers them all."""

from cifarx_train.models import lzh

__all__ = ["lzh"]
