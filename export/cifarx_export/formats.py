"""The table of formats: adding one is one module and one row."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

from torch import nn

from cifarx_serve.errors import UsageError, unknown
from cifarx_serve.spec import ModelSpec


class ExportOptions(NamedTuple):
    """What a user may choose of a conversion; a format that has no use for an option refuses it."""

    opset: int | None = None


class Artifact(Protocol):
    """A converted model in memory."""

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the file with the spec inside. Saving again with another spec changes nothing but the spec."""


class Converter(Protocol):
    """Converts a network in eval mode on the CPU."""

    def __call__(self, module: nn.Module, spec: ModelSpec, options: ExportOptions) -> Artifact: ...


class Format(NamedTuple):
    """A row: the converter stands as `module:function`, imported when the format is asked for."""

    suffix: str
    backend: str
    options: frozenset[str]
    legacy: bool
    converter: str

    def convert(self, module: nn.Module, spec: ModelSpec, options: ExportOptions) -> Artifact:
        """Convert a network; see `Converter`."""
        name, _, function = self.converter.partition(":")
        converter: Converter = getattr(import_module(name), function)
        return converter(module, spec, options)


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "onnx": Format(
            ".onnx", "onnxruntime", frozenset({"opset"}), False, "cifarx_export.onnx_format:convert_to_onnx"
        ),
        "torchscript": Format(
            ".torchscript.pt",
            "torchscript",
            frozenset(),
            True,
            "cifarx_export.torchscript_format:convert_to_torchscript",
        ),
    }
)


OPSETS: Final = range(18, 24)
"""18 is the lowest that the exporter writes; 23 the newest that is tested against ONNX Runtime."""


def require_opset(opset: int) -> None:
    """Raises UsageError where an ONNX file of that operator set is not to be had."""
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", f"give {OPSETS[0]} to {OPSETS[-1]}")


def export_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]
