"""TorchScript, traced and frozen. Legacy: PyTorch deprecated it in 2.11 and does not support it on Python 3.14."""

import io
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from cifarx_export.formats.fp16 import half_precision
from cifarx_export.formats.onnx.converter import example_input
from cifarx_export.formats.registry import Source
from cifarx_serve.backends.torch.torchscript import SPEC_FILE
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import ModelSpec


class TorchScriptArtifact:
    """A frozen script module."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def describe(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the archive with the spec among its extra files."""
        # To memory: given a path, PyTorch writes the path's name into the archive.
        archive = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            warnings.simplefilter("ignore", category=DeprecationWarning)
            torch.jit.save(self._module, archive, _extra_files={SPEC_FILE: spec.to_json()})
        _strip(archive, path)


def convert_to_torchscript(source: Source) -> TorchScriptArtifact:
    """Trace with a batch of two and freeze the weights in.

    Raises:
        UsageError: a Python that PyTorch no longer supports TorchScript on, or a weight that float16 cannot hold.
    """
    if sys.version_info >= (3, 14):
        raise UsageError("TorchScript is not supported on Python 3.14 and later", "use --format onnx")
    module = half_precision(source.module) if source.spec.precision == "fp16" else source.module
    with warnings.catch_warnings(), torch.no_grad():
        # The command has told of the deprecation, and what the tracer suspects the proof finds out.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, example_input(source.spec.input), check_trace=False)
        return TorchScriptArtifact(torch.jit.freeze(traced.eval()))


def _strip(archive: io.BytesIO, path: Path) -> None:
    """Copy all but the debug tables: stack traces with this machine's paths, which loading does not need."""
    with zipfile.ZipFile(archive) as full, zipfile.ZipFile(path, "w") as stripped:
        for entry in full.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                stripped.writestr(entry, full.read(entry))
