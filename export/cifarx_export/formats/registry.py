"""The table of formats: adding one is one module and one row. It drives the command line, its help, docs and tests."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, get_args

from cifarx_serve.errors import UsageError, unknown
from cifarx_serve.progress import Progress
from cifarx_serve.spec import ModelSpec, Precision

if TYPE_CHECKING:  # the command line's help reads this table, and loads no PyTorch for it
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

ATTEMPTS: Final[Mapping[Precision, int]] = MappingProxyType({"fp32": 1, "fp16": 1, "int8": 4})
"""How often a conversion may be tried until its proof passes."""

PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)

OPSETS: Final = range(18, 24)
"""18 is the lowest that the exporter writes; 23 the newest that is tested against ONNX Runtime."""


class ExportOptions(NamedTuple):
    """What a user may choose of a conversion; None is the format's own choice.

    A format that has no use for an option refuses it.

    Attributes:
        opset: of the ONNX file, one of `OPSETS`.
        calibration_images: training images that int8 is calibrated on.
        embed_preprocessing: the model takes uint8 pixels of any size and does resize, scaling and normalisation.
    """

    opset: int | None = None
    calibration_images: int | None = None
    embed_preprocessing: bool | None = None


NO_OPTIONS: Final = ExportOptions()


class Source(NamedTuple):
    """What a conversion starts from.

    Attributes:
        module: the network in eval mode, fp32, on the CPU; the converter may change it.
        spec: what the artifact will say, its precision among it.
        options: as the user gave them.
        training_images: so many images of the training split, spread over it, uint8 (N, height, width, 3).
        progress: told what is being done.
        kept: what a converter keeps for the next attempt, and for the next format in the same precision.
        attempt: how many conversions of it have failed their proof; int8 leaves more in fp32 each time.
    """

    module: "nn.Module"
    spec: ModelSpec
    options: ExportOptions
    training_images: "Callable[[int], NDArray[np.uint8]]"
    progress: Progress
    kept: dict[str, Any]
    attempt: int = 0


class Artifact(Protocol):
    """A converted model."""

    def describe(self, spec: ModelSpec) -> ModelSpec:
        """The spec with what only the conversion knows: the opset, the calibration, the oldest runtime."""

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the file with the spec inside. Saving again with another spec changes nothing but the spec."""


Converter = Callable[[Source], Artifact]


class Format(NamedTuple):
    """A row.

    Attributes:
        suffix: of the fp32 file.
        backend: what runs it.
        precisions: what it can hold.
        devices: where its files run.
        options: the names of the `ExportOptions` that it honours.
        converter: as `module:function`, imported when the format is asked for.
        legacy: deprecated by those who made it.
        model: a pattern of where the model is in an artifact that is a folder; None where it is a file.
    """

    suffix: str
    backend: str
    precisions: tuple[Precision, ...]
    devices: tuple[str, ...]
    options: tuple[str, ...]
    converter: str
    legacy: bool = False
    model: str | None = None

    def convert(self, source: Source) -> Artifact:
        """Convert a network."""
        name, _, function = self.converter.partition(":")
        converter: Converter = getattr(import_module(name), function)
        return converter(source)

    def file_name(self, stem: str, precision: Precision, embedded: bool = False) -> str:
        """`lzh_9.onnx`, `lzh_9.int8.onnx`, `lzh_9.embedded.fp16.onnx`."""
        parts = [stem, *(["embedded"] if embedded else []), *([precision] if precision != "fp32" else [])]
        return ".".join(parts) + self.suffix

    def model_file(self, path: Path) -> Path:
        """The file of an artifact that a backend opens."""
        return next(path.glob(self.model)) if self.model else path


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "onnx": Format(
            suffix=".onnx",
            backend="onnxruntime",
            precisions=("fp32", "fp16", "int8"),
            devices=("cpu", "cuda", "tensorrt"),
            options=("opset", "calibration_images", "embed_preprocessing"),
            converter="cifarx_export.formats.onnx.converter:convert_to_onnx",
        ),
        "torchscript": Format(
            suffix=".torchscript.pt",
            backend="torchscript",
            precisions=("fp32", "fp16"),
            devices=("cpu", "cuda", "mps"),
            options=(),
            converter="cifarx_export.formats.torchscript:convert_to_torchscript",
            legacy=True,
        ),
        "pt2": Format(
            suffix=".pt2",
            backend="exported_program",
            precisions=("fp32", "fp16"),
            devices=("cpu", "cuda"),
            options=(),
            converter="cifarx_export.formats.exported_program:convert_to_exported_program",
        ),
        "aotinductor": Format(
            suffix=".aoti.pt2",
            backend="aot_inductor",
            precisions=("fp32",),
            devices=("cpu",),
            options=(),
            converter="cifarx_export.formats.aot_inductor:convert_to_aot_inductor",
        ),
        "triton": Format(
            suffix=".triton",
            backend="onnxruntime",
            precisions=("fp32", "fp16", "int8"),
            devices=("cpu", "cuda"),
            options=("opset", "calibration_images", "embed_preprocessing"),
            converter="cifarx_export.formats.triton.converter:convert_to_triton",
            model="*/1/model.onnx",
        ),
    }
)


def export_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


def require_supported(name: str, precision: str, options: ExportOptions) -> None:
    """Refuse what a format cannot honour.

    Raises:
        UsageError: no such precision, or an option that means nothing here.
    """
    kind = export_format(name)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision not in kind.precisions:
        able = [other for other, row in FORMATS.items() if precision in row.precisions]
        raise UsageError(
            f"format {name} has no {precision}", f"it has {', '.join(kind.precisions)}; {', '.join(able)} can do it"
        )
    for option, value in options._asdict().items():
        if value is not None and option not in kind.options:
            flag = f"--{option.replace('_', '-')}"
            able = [other for other, row in FORMATS.items() if option in row.options]
            raise UsageError(f"format {name} has no {flag}", f"leave it out, or export {' or '.join(able)} alone")
    if options.calibration_images is not None and precision != "int8":
        raise UsageError(f"{precision} is not calibrated", "leave --calibration-images out, or add --precision int8")
    if options.opset is not None and options.opset not in OPSETS:
        raise UsageError(f"opset {options.opset} is not supported", f"give {OPSETS[0]} to {OPSETS[-1]}")
