"""TorchScript, traced and frozen.

TorchScript is a legacy format: PyTorch 2.11 deprecated it, and PyTorch does not support it on Python 3.14.
"""

import io
import sys
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

import torch
from torch.jit._trace import TracerWarning

from cifarx_export.formats.conversion_errors import is_user_code, reporting_conversion_errors
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_export.formats.traced_module import fp16_checks, module_to_trace
from cifarx_export.parity.checks import Check
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec

_KEPT: Final = {
    "Converting a tensor to a Python boolean": "the branch that was taken",
    "Converting a tensor to a Python list": "the values that were computed",
    "Converting a tensor to a NumPy array": "the values that were computed",
    "Converting a tensor to a Python": "the number that was computed",
    "torch.from_numpy": "the values that were computed",
    "Iterating over a tensor": "the number of steps that was taken",
}
"""What a traced network keeps for all images, by the start of the tracer's warning."""

_MAX_NOTES: Final = 5

_ARITHMETIC: Final = frozenset(f"aten::{name}" for name in ("add", "div", "floor_divide", "mul", "remainder", "sub"))
"""Operators that take a number in place of a tensor as their second operand."""


class TorchScriptArtifact(Artifact):
    """A frozen `torch.jit.ScriptModule`."""

    def __init__(self, module: Any, checks: Sequence[Check] = ()) -> None:
        self._module = module
        self.checks = checks

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

    The tracer follows the control flow of Python only for the images that it is given. A note names each line of the
    network's code where it warns about that; the parity check finds whether it matters.

    Raises:
        UsageError: PyTorch does not support TorchScript on this version of Python, a weight is outside the range of
            float16, or the network cannot be traced.
    """
    if sys.version_info >= (3, 14):
        raise UsageError("TorchScript is not supported on Python 3.14 and later", "use --format onnx")
    module, example = module_to_trace(source), source.example_input()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():  # also the deprecation, already reported
        warnings.simplefilter("always")
        with reporting_conversion_errors("TorchScript", module, example), redirect_stdout(io.StringIO()):
            traced = torch.jit.trace(module, example, check_trace=False)
            frozen = torch.jit.freeze(traced.eval())
    for line in tracer_notes(caught):
        source.progress(line)
    _replace_integer_tensors(frozen.graph)
    return [TorchScriptArtifact(frozen, fp16_checks(source))]


def tracer_notes(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Return a note for each line of the user's code that the tracer warns about, at most `_MAX_NOTES` and a count.

    Packages such as torchvision compare sizes in ways that the tracer warns about too, but those do not vary.
    """
    warned = [entry for entry in caught if issubclass(entry.category, TracerWarning)]
    lines = {
        f"{Path(entry.filename).name} line {entry.lineno}: TorchScript keeps {_kept(str(entry.message))}"
        for entry in warned
        if is_user_code(entry.filename)
    }
    notes = [f"note: {line}" for line in sorted(lines)]
    rest = len(notes) - _MAX_NOTES
    return [*notes[:_MAX_NOTES], f"note: {rest} more lines like these"] if rest > 0 else notes


def _kept(warning: str) -> str:
    kept = next((kept for start, kept in _KEPT.items() if warning.startswith(start)), "what happened")
    return f"{kept} for the traced images"


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
