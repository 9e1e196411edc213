"""What is exported: the network of a checkpoint, or an ONNX file that has a spec."""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from cifarx_export.formats.registry import ExportOptions, get_format, require_weights_fit
from cifarx_serve.backends.base import Backend
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_serve.spec import ModelSpec, Precision
from cifarx_train.checkpoints.checkpoint import Checkpoint, StateDict, file_sha256, load_checkpoint, weights_sha256
from cifarx_train.checkpoints.source_weights import load_model, load_module, load_source_weights, model_directory
from cifarx_train.models.options import NO_OPTIONS, ModelOptions
from cifarx_train.pytorch_backend import PyTorchBackend

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

CPU = Device("cpu")

ONNX_SUFFIX = ".onnx"

_WEIGHTS_SUFFIX: Final = re.compile(r"\.(pth\.tar|pth|pt|ckpt|bin|safetensors)$")
"""The usual suffixes of files with weights, which the names of artifacts do not have."""


class Origin(NamedTuple):
    """A network to export.

    Attributes:
        name: the name of its file, for reports.
        stem: the start of the names of its artifacts.
        spec: its spec, with the hash of the file and of the weights.
        sha256: the hash of the file.
        open: opens the reference of its artifacts, on the CPU.
        build_module: returns a new copy of the network. That of an ONNX file is made from its operators.
        load_onnx: returns the model of an ONNX file; None for a network of PyTorch.
        trained_here: whether `cifarx train` trained the network, and the user states nothing else about its images.
        states_output: whether the file or the user states that the network returns logits, or probabilities.
        weight_bytes: size of the weights of a network of PyTorch in fp32.
    """

    name: str
    stem: str
    spec: ModelSpec
    sha256: str
    open: Callable[[], Backend]
    build_module: "Callable[[], nn.Module]"
    load_onnx: "Callable[[], ModelProto] | None"
    trained_here: bool
    states_output: bool
    weight_bytes: int = 0


def open_origin(source: "Path | nn.Module | None", options: ModelOptions) -> Origin:
    """Open the network to export.

    Args:
        source: a checkpoint, an ONNX file of `cifarx export` or `cifarx adopt`, or a directory of Hugging Face; a
            module in memory, which is not changed; or None for a network that `options.model` names with its weights.
        options: what the user states about it.

    Raises:
        UsageError, ModelFileError, SpecError: the network cannot be exported, or see `load_model`.
    """
    if source is None:
        loaded = load_source_weights(options)
        directory = model_directory(options)
        return checkpoint_origin(_source_name(loaded), _source_sha256(directory, loaded), loaded, options)
    if not isinstance(source, Path):
        loaded = load_module(source, options.overrides)
        return checkpoint_origin(_source_name(loaded), weights_sha256(loaded.weights), loaded, options)
    if source.is_dir():
        loaded = load_model(source, options)
        return checkpoint_origin(_source_name(loaded), _source_sha256(source, loaded), loaded, options)
    if detect_format(source) is FileFormat.ONNX:
        return _onnx_origin(source, options)
    loaded = load_checkpoint(source, options)
    return checkpoint_origin(source.name, file_sha256(source), loaded, options)


def origin_directory(source: "Path | nn.Module | None", options: ModelOptions) -> Path:
    """Return the directory for the artifacts of a network: that of its file, or the one that contains its directory."""
    path = source if isinstance(source, Path) else model_directory(options)
    if path is None:
        return Path()
    return path.parent if path.name else path.resolve().parent  # `.` has no name and no parent


def _source_name(loaded: Checkpoint) -> str:
    source = loaded.spec.source
    assert source is not None, "the network was found by its source"
    return loaded.spec.model if source.kind == "python" else source.name


def _source_sha256(directory: Path | None, loaded: Checkpoint) -> str:
    """Return the hash of the file with the weights in a directory, or else that of the weights."""
    if directory is None:
        return weights_sha256(loaded.weights)
    from cifarx_train.models.hugging_face import weights_file

    file = weights_file(directory)
    assert file is not None, "the weights were loaded from it"
    return file_sha256(file)


def checkpoint_origin(name: str, sha256: str, checkpoint: Checkpoint, options: ModelOptions) -> Origin:
    """Return the origin for a checkpoint in memory. For the arguments see `Origin`."""
    # Free the optimizer state, which can be twice as large as the weights.
    loaded = checkpoint._replace(training={})
    spec = msgspec.structs.replace(loaded.spec, checkpoint_sha256=sha256, weights_sha256=weights_sha256(loaded.weights))
    return Origin(
        name,
        _WEIGHTS_SUFFIX.sub("", name),
        spec,
        sha256,
        lambda: PyTorchBackend.from_checkpoint(loaded, CPU),
        loaded.build,
        None,
        spec.training is not None and not options.overrides.fields,
        spec.training is not None or "output" in options.overrides.fields,
        _fp32_bytes(loaded.weights),
    )


def _fp32_bytes(weights: StateDict) -> int:
    """Return the size of the weights in fp32. Weights that several layers share count once."""
    tensors = [value for value in weights.values() if hasattr(value, "data_ptr")]
    return sum({value.data_ptr(): 4 * value.numel() for value in tensors}.values())


def _onnx_origin(path: Path, options: ModelOptions) -> Origin:
    if options != NO_OPTIONS:
        raise UsageError(f"{path} contains its own spec", "leave out --model, --spec and the other fields of the spec")
    spec = OnnxRuntimeBackend.read_spec(path)
    if spec.precision != "fp32" or spec.embedded_preprocessing:
        kind = "embedded preprocessing" if spec.embedded_preprocessing else f"precision {spec.precision}"
        raise UsageError(f"{path} has {kind}", "give the fp32 file that it was made from")
    sha256 = file_sha256(path)
    return Origin(
        path.name,
        path.name.removesuffix(ONNX_SUFFIX),
        msgspec.structs.replace(spec, checkpoint_sha256=sha256, parity=None),
        sha256,
        lambda: OnnxRuntimeBackend(path, CPU),
        _network_builder(path, spec),
        lambda: _load_onnx(path),
        spec.training is not None,
        "output" not in spec.assumed,
    )


def _network_builder(path: Path, spec: ModelSpec) -> "Callable[[], nn.Module]":
    """Return a function that returns a new network with the operators of an ONNX file."""

    @cache
    def build() -> "nn.Module":
        from cifarx_export.onnx_network.network import build_network  # imports PyTorch

        return build_network(_load_onnx(path), path.name, spec)

    return lambda: copy.deepcopy(build())


def _load_onnx(path: Path) -> "ModelProto":
    import onnx

    return onnx.load(path)


def require_convertible(origin: Origin, name: str, precision: Precision, options: ExportOptions) -> None:
    """Check that an origin can be exported to a format.

    Args:
        origin: the network.
        name: the name of the format.
        precision: the precision of the artifact.
        options: the options of the conversion.

    Raises:
        UsageError: its weights are too large for the format; or it is an ONNX file, and the format is made from a
            network of PyTorch, which the file cannot become, or the artifact would be the same model.
    """
    require_weights_fit(name, origin.weight_bytes)
    if origin.load_onnx is None:
        return
    if not get_format(name).is_made_from_onnx:
        origin.build_module()
    if options.opset is not None:
        raise UsageError(f"{origin.name} is an ONNX file, whose opset is not changed", "leave --opset out")
    if name == "onnx" and precision == "fp32" and not options.embed_preprocessing:
        raise UsageError(
            f"{origin.name} is an ONNX file in fp32 already", "add --precision int8 or fp16, or --embed-preprocessing"
        )
