"""The layers of a checkpoint's network, and the values between them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarx_export.layerwise.network import Key, Layer, Network, Values
from cifarx_serve.images.preprocess import model_input


class TorchNetwork(Network):
    """A checkpoint's network; inside values are seen by hooks."""

    def __init__(self, path: Path, model: str | None) -> None:
        from cifarx_train.checkpoints.checkpoint import load_checkpoint

        loaded = load_checkpoint(path, model)
        self.spec = loaded.spec
        self._module = loaded.build()
        self.output = ("", 0, True)
        self.output_label = ""
        self.layers = self._find_layers()

    def _find_layers(self) -> list[Layer]:
        """By running it once; a module that is called several times is several layers."""
        from torch.nn.modules.batchnorm import _BatchNorm

        taken = self.spec.input
        layers: list[Layer] = []
        last: tuple[Any, int, Key] = (None, 0, "")

        def see(key: tuple[str, int, bool], module: Any, tensor: Any) -> None:
            nonlocal last
            name, call, is_output = key
            if not name:
                return
            if not is_output:
                # The very tensor that the last layer gave, and nothing wrote into it since.
                straight = tensor is last[0] and tensor._version == last[1]
                is_norm = isinstance(module, _BatchNorm)
                weight = tuple(sorted(module.weight.shape))
                fed = last[2] if straight else key
                label = type(module).__name__
                layers.append(Layer(name, call, label, weight, is_norm, fed, "", (name, call, True)))
            else:
                last = (tensor, tensor._version, key)

        self._run(np.zeros((1, taken.height, taken.width, taken.channels), np.uint8), see)
        return layers

    def values(self, keys: set[Key], images: NDArray[np.uint8]) -> Values:
        found: Values = {}

        def see(key: tuple[str, int, bool], _module: Any, tensor: Any) -> None:
            if key in keys:
                found[key] = tensor.clone().numpy()  # a layer that works in place would change it

        self._run(images, see)
        return found

    def _run(self, images: NDArray[np.uint8], see: Callable[[tuple[str, int, bool], Any, Any], None]) -> None:
        """Run the network and show what each module with a weight takes and gives, and the logits."""
        import torch

        calls: Counter[str] = Counter()
        handles = []

        def watch(name: str, module: Any) -> None:
            def before(_module: Any, taken: tuple[Any, ...]) -> None:
                see((name, calls[name], False), module, taken[0])

            def after(_module: Any, _taken: Any, given: Any) -> None:
                see((name, calls[name], True), module, given)
                calls[name] += 1

            handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

        try:
            for name, module in self._module.named_modules():
                if not name or isinstance(getattr(module, "weight", None), torch.Tensor):
                    watch(name, module)
            with torch.no_grad():
                self._module(torch.from_numpy(model_input(images, self.spec)))
        finally:
            for handle in handles:
                handle.remove()
