"""A classifier in a TorchScript file of another program."""

import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from cifarx_export.adoption.foreign_file import ForeignFile, StatedInput, StatedOutput
from cifarx_export.formats.torchscript import TorchScriptArtifact
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.backends.torch.torchscript import load_script_module
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.spec import Activation, InputSpec, ModelSource, ModelSpec
from cifarx_train.models.options import SpecOverrides
from cifarx_train.models.outputs import count_outputs, require_outputs, runs_with, select_output

CPU: Final = torch.device("cpu")

_ACTIVATIONS: Final[dict[str, Activation]] = {
    "aten::sigmoid": "sigmoid",
    "aten::sigmoid_": "sigmoid",
    "aten::softmax": "softmax",
}

_SHAPE_OPERATORS: Final = frozenset(
    {"aten::contiguous", "aten::detach", "aten::flatten", "aten::reshape", "aten::squeeze", "aten::to", "aten::view"}
)
"""Operators that change neither the values of an image nor their order."""


class TorchScriptFile(ForeignFile):
    """A TorchScript file without a spec.

    Args:
        path: the file.

    Raises:
        ModelFileError: the file is damaged, or not safe to open.
    """

    kind = "torchscript"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._module = load_script_module(path, CPU).eval()

    def describe(self, overrides: SpecOverrides) -> ModelSpec:
        size = self.input_spec(self._stated_input(overrides), overrides)
        return self.complete_spec(size, self._find_output(size, overrides), overrides)

    def open_original(self, spec: ModelSpec) -> Backend:
        return OriginalTorchScript(self._module, spec)

    def connected(self, spec: ModelSpec) -> TorchScriptArtifact:
        assert spec.source is not None, "set by complete_spec"
        single = require_outputs(self._module, spec.output_size, spec.input, spec.source)
        if single is self._module:
            return TorchScriptArtifact(self._module)
        with warnings.catch_warnings(), torch.no_grad():
            # PyTorch has deprecated the format. The trace only adds the selection; the parity check covers it.
            warnings.simplefilter("ignore")
            example = torch.zeros(2, *spec.input.shape)
            return TorchScriptArtifact(torch.jit.trace(single.eval(), example, check_trace=False))

    def _stated_input(self, overrides: SpecOverrides) -> StatedInput:
        """Return what the first weights say, if the user does not say it. A frozen file has none.

        They are those of the first convolution in the order of the attributes, which need not be the first that runs.
        """
        if overrides.fields.get("input", {}).keys() & {"channels", "color", "layout"}:
            return StatedInput()
        first = next((weight for weight in self._module.parameters() if weight.ndim == 4), None)
        if first is None or first.shape[1] not in (1, 3):
            return StatedInput()
        return StatedInput(layout="NCHW", channels=first.shape[1])

    def _find_output(self, size: InputSpec, overrides: SpecOverrides) -> StatedOutput:
        stated = dict(overrides.fields.get("source", {})).get("output")
        source = ModelSource(kind="torchscript", name=str(self.path), output=stated)
        if not runs_with(self._module, size) and self._runs_alone(size):
            raise ModelFileError(
                f"{self.path} runs on one image, but not on a batch of two",
                "trace it again with an example of at least two images",
            )
        count = count_outputs(self._module, size, source)
        if count is None and (names := overrides.fields.get("class_names")):
            count = len(names)
        if count is None:
            raise UsageError(
                f"{self.path} returns several tensors, of which more than one could be the classes",
                "state its position or key as output in the source table of --spec FILE",
            )
        key = getattr(require_outputs(self._module, count, size, source), "key", None)
        return StatedOutput(key, count, self._activation(key))

    def _runs_alone(self, size: InputSpec) -> bool:
        try:
            with torch.no_grad():
                self._module(torch.zeros(1, *size.shape))
        except Exception:  # the errors of script modules have no common base class
            return False
        return True

    def _activation(self, key: str | int | None) -> Activation | None:
        """Return the activation that the network ends with, over the classes, which are the last axis."""
        graph = self._module.inlined_graph  # a node is valid only as long as its graph
        node = next(graph.outputs()).node()
        if node.kind() in ("prim::TupleConstruct", "prim::ListConstruct") and isinstance(key, int):
            node = list(node.inputs())[key].node()
        while node.kind() in _SHAPE_OPERATORS:
            node = next(node.inputs()).node()
        activation = _ACTIVATIONS.get(node.kind())
        if activation == "softmax" and list(node.inputs())[1].toIValue() not in (1, -1):
            return None
        return activation


class OriginalTorchScript(TorchBackend):
    """Runs a TorchScript file as another program would."""

    name = "torchscript"

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        self.spec = spec
        output = spec.source.output if spec.source else None
        self._init_module(module if output is None else _Selected(module, output), CPU)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        raise ModelFileError(f"{path} contains no model spec", "adopt it with `cifarx adopt`")


class _Selected:
    """Returns one of the outputs of a module."""

    def __init__(self, module: Any, output: str | int) -> None:
        self._module = module
        self._output = output

    def __call__(self, images: Tensor) -> Tensor:
        return select_output(self._module(images), self._output)
