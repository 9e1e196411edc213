"""TorchScript, traced and frozen.

TorchScript is a legacy format: PyTorch 2.11 deprecated it, and PyTorch does not support it on Python 3.14.
"""

import io
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, Final

import torch

from cifarx_export.formats.fp16 import convert_module_to_fp16
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec

_ARITHMETIC: Final = frozenset(f"aten::{name}" for name in ("add", "div", "floor_divide", "mul", "remainder", "sub"))
"""Operators that take a number in place of a tensor as their second operand."""


class TorchScriptArtifact(Artifact):
    """A frozen `torch.jit.ScriptModule`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the archive with the spec as its only extra file."""
        archive = io.BytesIO()  # given a path, PyTorch would write the file name into the archive
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            warnings.simplefilter("ignore", category=DeprecationWarning)
            torch.jit.save(self._module, archive, _extra_files={SPEC_FILE: spec.to_json()})
        _write_without_debug_tables(archive, path)


def convert_to_torchscript(source: ConversionSource) -> list[TorchScriptArtifact]:
    """Trace the network with a batch of two and freeze it. Returns one artifact.

    Raises:
        UsageError: PyTorch does not support TorchScript on this version of Python, or a weight is outside the range of
            float16.
    """
    if sys.version_info >= (3, 14):
        raise UsageError("TorchScript is not supported on Python 3.14 and later", "use --format onnx")
    module = source.build_module()
    if source.spec.precision == "fp16":
        module = convert_module_to_fp16(module, source.spec.input.layout)
    with warnings.catch_warnings(), torch.no_grad():
        # The command has already reported the deprecation, and the parity check covers what the tracer warns about.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, source.example_input(), check_trace=False)
        frozen = torch.jit.freeze(traced.eval())
        _replace_integer_tensors(frozen.graph)
        return [TorchScriptArtifact(frozen)]


def _replace_integer_tensors(graph: Any) -> None:
    """Replace tensors of one integer by that integer where they are operands of arithmetic.

    The tracer records the arithmetic of shapes, such as that of a vision transformer, with tensors as constants. In a
    file that is loaded on a GPU they would be on the GPU, and each run would wait for it to compute shapes.
    """
    for constant in graph.findAllNodes("prim::Constant", recurse=True):
        if not constant.hasAttribute("value") or constant.kindOf("value") != "t":
            continue
        tensor = constant.t("value")
        if tensor.dim() > 0 or tensor.dtype != torch.int64:
            continue
        for use in list(constant.output().uses()):
            if use.user.kind() in _ARITHMETIC and use.offset == 1:
                integer = graph.insertConstant(int(tensor))
                integer.node().moveBefore(use.user)
                use.user.replaceInput(use.offset, integer)


def _write_without_debug_tables(archive: io.BytesIO, path: Path) -> None:
    """Copy all but the debug tables: they hold stack traces with paths of this machine, and loading ignores them."""
    with zipfile.ZipFile(archive) as full, zipfile.ZipFile(path, "w") as stripped:
        for entry in full.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                stripped.writestr(entry, full.read(entry))
