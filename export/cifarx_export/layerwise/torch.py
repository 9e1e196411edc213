"""The layers of a checkpoint's network."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarx_export.layerwise.network import Activations, Layer, LayerwiseNetwork, TensorKey
from cifarx_serve.images.preprocess import model_input
from cifarx_train.models.options import ModelOptions

_Hook = Callable[[tuple[str, int, bool], Any, Any], None]
"""Called with a key, the module and the tensor."""


class TorchNetwork(LayerwiseNetwork):
    """A checkpoint's network. Intermediate tensors are read by forward hooks."""

    def __init__(self, path: Path, options: ModelOptions) -> None:
        from cifarx_train.checkpoints.checkpoint import load_checkpoint

        loaded = load_checkpoint(path, options)
        self.spec = loaded.spec
        self._module = loaded.build()
        self.output = ("", 0, True)
        self.output_label = ""
        self.layers = self._find_layers()

    def _find_layers(self) -> list[Layer]:
        """Run the network once to find the order of execution; each call of a shared module is a layer."""
        from torch.nn.modules.batchnorm import _BatchNorm

        size = self.spec.input
        layers: list[Layer] = []
        previous: tuple[Any, int, TensorKey] = (None, 0, "")  # output of the previous layer, its version and key

        def record(key: tuple[str, int, bool], module: Any, tensor: Any) -> None:
            nonlocal previous
            name, call, is_output = key
            if not name:
                return
            if is_output:
                previous = (tensor, tensor._version, key)
                return
            # The previous layer's output itself, which no in-place operation has changed since.
            direct = tensor is previous[0] and tensor._version == previous[1]
            layers.append(
                Layer(
                    name=name,
                    call=call,
                    label=type(module).__name__,
                    weight_shape=tuple(sorted(module.weight.shape)),
                    is_norm=isinstance(module, _BatchNorm),
                    input=previous[2] if direct else key,
                    input_label="",
                    output=(name, call, True),
                )
            )

        self._run(np.zeros((1, size.height, size.width, size.channels), np.uint8), record)
        return layers

    def activations(self, keys: set[TensorKey], images: NDArray[np.uint8]) -> Activations:
        found: Activations = {}

        def record(key: tuple[str, int, bool], _module: Any, tensor: Any) -> None:
            if key in keys:
                found[key] = tensor.clone().numpy()  # a later in-place operation would change it

        self._run(images, record)
        return found

    def _run(self, images: NDArray[np.uint8], hook: _Hook) -> None:
        """Run the network; call `hook` with the input and output of each module that has a weight, and the logits."""
        import torch

        calls: Counter[str] = Counter()
        handles = []

        def watch(name: str, module: Any) -> None:
            def before(_module: Any, inputs: tuple[Any, ...]) -> None:
                hook((name, calls[name], False), module, inputs[0])

            def after(_module: Any, _inputs: Any, output: Any) -> None:
                hook((name, calls[name], True), module, output)
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
