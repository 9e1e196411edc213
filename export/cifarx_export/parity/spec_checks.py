"""Compare the specs of an artifact and its reference, and the tensors of the artifact with its spec.

Equal logits reveal neither a wrong class name nor wrong preprocessing.
"""

from collections.abc import Sequence
from typing import Any, Final

from cifarx_export.parity.checks import Check
from cifarx_serve.backends.base import Backend, TensorInfo
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.models.description import describe_input

ASSUMED: Final = "ASSUMED"
"""The word that marks what nobody stated, wherever it is shown."""

_MAX_NAMES: Final = 12

_PREPROCESSING_FIELDS: Final = tuple(name for name in InputSpec.__struct_fields__ if name != "layout")
"""The order of the axes is not among them: a format may have its own. `check_interface` and the runs check it."""

_OUTPUT_FIELDS: Final = ("output", "activation", "output_size", "thresholds", "temperature")


def check_specs(reference: ModelSpec, artifact: ModelSpec) -> list[Check]:
    """Compare class names, preprocessing and output. What either side only assumes is marked, not confirmed."""
    assumed = {*reference.assumed, *artifact.assumed}
    names = (reference.class_names, artifact.class_names)
    architecture = [_check("architecture", "", reference.model, True)] if "architecture" in assumed else []
    return [
        *architecture,
        _check("class names", _different_name(*names), describe_names(artifact.class_names), "class_names" in assumed),
        _check(
            "preprocessing",
            _different_fields(reference.input, artifact.input, _PREPROCESSING_FIELDS),
            describe_input(artifact.input),
            "preprocessing" in assumed,
        ),
        _check(
            "output",
            _different_fields(reference, artifact, _OUTPUT_FIELDS),
            describe_output(artifact),
            "output" in assumed,
        ),
    ]


def check_interface(artifact: Backend) -> list[Check]:
    """Compare the dtypes, ranks and sizes of input and output with the spec, if the file states them.

    The batch axis must be of variable size. The names of the tensors and axes are shown, but not compared.
    """
    found = artifact.tensor_infos()
    if not found:
        return []
    text = ", ".join(f"{info.name} {_tensor(info.dtype, info.shape)}" for info in found)
    expected = _expected_tensors(artifact.spec)
    if len(found) == len(expected) and all(map(_fits, found, expected)):
        return [Check("interface", True, text)]
    wanted = " and ".join(_tensor(info.dtype, info.shape) for info in expected)
    return [Check("interface", False, f"{text} instead of {wanted}")]


def describe_names(names: Sequence[str]) -> str:
    """Return the first `_MAX_NAMES` class names on one line."""
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def describe_output(spec: ModelSpec) -> str:
    """Return on one line what the model returns and what is made of it."""
    count = spec.output_size
    values = spec.output if count > 1 else {"logits": "logit", "probabilities": "probability"}[spec.output]
    thresholds = f", thresholds {spec.thresholds}" if spec.thresholds else ""
    temperature = f", temperature {spec.temperature:.4g}" if spec.temperature else ""
    return f"{count} {values}, {spec.activation}{thresholds}{temperature}"


def _check(name: str, difference: str, found: str, assumed: bool) -> Check:
    if difference:
        return Check(name, False, difference)
    return Check(name, True, f"{ASSUMED}: {found}" if assumed else found, assumed)


def _different_name(reference: Sequence[str], artifact: Sequence[str]) -> str:
    """Return the first difference between two lists of class names, or nothing."""
    if len(artifact) != len(reference):
        return f"{len(artifact)} instead of {len(reference)}"
    for index, (expected, found) in enumerate(zip(reference, artifact, strict=True)):
        if expected != found:
            return f"class {index} is {found} instead of {expected}"
    return ""


def _different_fields(reference: object, artifact: object, names: Sequence[str]) -> str:
    """Return the attributes that differ, or nothing."""
    values: list[tuple[str, Any, Any]] = [(name, getattr(artifact, name), getattr(reference, name)) for name in names]
    return ", ".join(f"{name} {found} instead of {expected}" for name, found, expected in values if found != expected)


def _expected_tensors(spec: ModelSpec) -> tuple[TensorInfo, TensorInfo]:
    """Return the input and the output that the spec describes."""
    image = spec.input
    pixels: tuple[int | str, ...] = (image.height, image.width, image.channels)
    if spec.embedded_preprocessing:
        pixels = ("height", "width", image.channels)
    elif image.layout == "NCHW":
        pixels = (image.channels, image.height, image.width)
    dtype = "uint8" if spec.embedded_preprocessing else image.dtype
    return (
        TensorInfo("input", dtype, ("batch", *pixels)),
        TensorInfo(spec.output, "float32", ("batch", spec.output_size)),
    )


def _fits(found: TensorInfo, expected: TensorInfo) -> bool:
    """Return whether a tensor takes or returns what is expected.

    An axis of variable size also fits where a size is expected: the runs show whether the model accepts that size.
    """
    if found.dtype != expected.dtype or len(found.shape) != len(expected.shape):
        return False
    return all(
        not isinstance(size, int) or size == wanted for size, wanted in zip(found.shape, expected.shape, strict=True)
    )


def _tensor(dtype: str, shape: Sequence[int | str | None]) -> str:
    return f"{dtype} ({', '.join('?' if size is None else str(size) for size in shape)})"
