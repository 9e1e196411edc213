"""TorchScript, traced and frozen.

TorchScript is a legacy format: PyTorch 2.11 deprecated it, and PyTorch does not support it on Python 3.14.
"""

import io
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from cifarx_export.formats.fp16 import convert_module_to_fp16
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec


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
        module = convert_module_to_fp16(module)
    with warnings.catch_warnings(), torch.no_grad():
        # The command has already reported the deprecation, and the parity check covers what the tracer warns about.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, source.example_input(), check_trace=False)
        return [TorchScriptArtifact(torch.jit.freeze(traced.eval()))]


def _write_without_debug_tables(archive: io.BytesIO, path: Path) -> None:
    """Copy all but the debug tables: they hold stack traces with paths of this machine, and loading ignores them."""
    with zipfile.ZipFile(archive) as full, zipfile.ZipFile(path, "w") as stripped:
        for entry in full.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                stripped.writestr(entry, full.read(entry))
