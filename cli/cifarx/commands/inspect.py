"""The `cifarx inspect` command."""

from pathlib import Path
from textwrap import shorten
from typing import Annotated, Final

import typer

from cifarx.model_flags import (
    NO_MODEL_FLAGS,
    SOURCE_HELP,
    ModelFlags,
    read_stated_spec,
    stated_options,
    takes_flags,
)
from cifarx.options import Json
from cifarx.output.console import json_result, result
from cifarx_serve.backends.base import require_file
from cifarx_serve.backends.registry import WEB_MODEL, model_file
from cifarx_serve.errors import CheckFailed, ModelFileError, UsageError, error_message
from cifarx_serve.files.checksum import ChecksumState, damaged_member, read_checksum
from cifarx_serve.files.file_format import CHECKPOINT_FORMATS, detect_format
from cifarx_serve.scores import DEFAULT_THRESHOLD
from cifarx_serve.spec import Assumption, InputSpec, ModelSpec

_ARGUMENT_WIDTH: Final = 80


@takes_flags(ModelFlags)
def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Checkpoint or artifact.")],
    check: Annotated[bool, typer.Option("--check", help="Also check whether the file is intact.")] = False,
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help=SOURCE_HELP)] = None,
    flags: ModelFlags = NO_MODEL_FLAGS,
    template: Annotated[
        bool, typer.Option("--spec-template", help="Print the spec as TOML with comments, to complete it for --spec.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the model spec of a file."""
    if template and json:
        raise UsageError("--spec-template and --json were given together", "choose one of them")
    # The check comes first, because the spec in a damaged file can be wrong.
    checked = [("checksum", _check(model_file(Path(file))))] if check else []
    spec = read_stated_spec(file, stated_options([file], model, flags))
    if template:
        from cifarx.output.spec_template import spec_template

        result(*spec_template(spec, Path(file).name).split("\n"))
    elif json:
        json_result(spec)
    else:
        result(*[f"{name:<15} {value}" for name, value in [*_facts(spec), *checked]])


def _check(path: Path) -> str:
    """Return a line about the checksum of an intact file.

    Raises:
        CheckFailed: the file was changed, or has no checksum.
    """
    require_file(path)
    if path.name == WEB_MODEL:
        _check_web_directory(path.parent)
    checksum = read_checksum(path)
    if checksum.state is ChecksumState.CHANGED:
        raise CheckFailed(f"the checksum of {path} does not match", "get the file again, or export it again")
    if checksum.state is ChecksumState.INTACT:
        return f"intact, sha256 {checksum.sha256}"
    if path.suffix == ".pth" or detect_format(path) in CHECKPOINT_FORMATS:
        return _check_members(path)
    raise CheckFailed(f"{path} has no checksum", "it is truncated, or written by another program; export it again")


def _check_web_directory(directory: Path) -> None:
    from cifarx_serve.backends.web.directory import require_intact_directory

    try:
        require_intact_directory(directory)
    except ModelFileError as error:
        raise CheckFailed(error.problem, error.remedy) from error


def _check_members(path: Path) -> str:
    """Check the CRC-32 that PyTorch writes with every member of the archive of a checkpoint."""
    try:
        damaged = damaged_member(path)
    except Exception as error:  # the exceptions of zipfile for damaged archives have no common base class
        raise CheckFailed(
            f"{path} has no checksum and is not a zip archive ({error_message(error)})", "save it again, or train again"
        ) from error
    if damaged:
        raise CheckFailed(f"the CRC-32 of {damaged} in {path} does not match", "get the file again")
    return "none; the CRC-32 of every member matches (it does not cover the bytes between members)"


def _facts(spec: ModelSpec) -> list[tuple[str, str]]:
    model = f"{spec.model}{', small stem' if spec.stem == 'small' else ''}, {spec.precision}"
    classes = f"{len(spec.class_names)}: {', '.join(spec.class_names)}"
    preprocessing = _preprocessing(spec.input, spec.embedded_preprocessing)
    return [
        ("model", _marked(model, "architecture", spec)),
        *_source(spec),
        ("classes", _marked(classes, "class_names", spec)),
        ("input", _input(spec)),
        ("preprocessing", _marked(preprocessing, "preprocessing", spec)),
        ("output", _marked(_output(spec), "output", spec)),
        *_training(spec),
        *_export(spec),
        *_parity(spec),
    ]


def _marked(text: str, part: Assumption, spec: ModelSpec) -> str:
    """Return a text about a part of the spec, marked if nobody stated that part."""
    return f"ASSUMED: {text}" if part in spec.assumed else text


def _source(spec: ModelSpec) -> list[tuple[str, str]]:
    source = spec.source
    if source is None:
        return []
    arguments = [
        shorten(f"{name}={value!r}", _ARGUMENT_WIDTH, placeholder=" …") for name, value in source.arguments.items()
    ]
    output = [] if source.output is None else [f"its output {source.output!r}"]
    sha256 = [f"sha256 {source.sha256}"] if source.sha256 else []
    return [("source", ", ".join([f"{source.kind} {source.name}", *arguments, *output, *sha256]))]


def _input(spec: ModelSpec) -> str:
    expected = spec.input
    if spec.embedded_preprocessing:
        return f"uint8 NHWC (N, any height, any width, {expected.channels}), {'L' if expected.channels == 1 else 'RGB'}"
    shape = ", ".join(map(str, expected.shape))
    return f"{expected.dtype} {expected.layout} (N, {shape}), {expected.color}"


def _preprocessing(spec: InputSpec, embedded: bool) -> str:
    numbers = f"range {spec.value_range}, mean {spec.mean}, std {spec.std}"
    color = f"{spec.color}, " if embedded else ""
    return f"{color}{_resizing(spec)}, {numbers}, {'inside the model' if embedded else 'before the model'}"


def _resizing(spec: InputSpec) -> str:
    size = f"{spec.height}x{spec.width}"
    resize = f"resize {spec.interpolation}{'' if spec.antialias else ' without antialiasing'}"
    if spec.resize == "letterbox":
        return f"{resize} to fit into {size}, pad with {spec.fill}"
    if spec.resize == "stretch" and spec.resize_to is None:
        return f"{resize} to {size}"
    if isinstance(spec.resize_to, tuple):
        smallest = spec.resize_to
        target = f"{resize} to {'x'.join(map(str, spec.resize_to))}"
    else:
        shorter = spec.resize_to or spec.height
        smallest = (shorter, shorter)
        target = f"{resize} to a shorter side of {shorter}"
    padded = smallest[0] < spec.height or smallest[1] < spec.width
    return f"{target}, crop the center to {size}{f', pad with {spec.fill}' if padded else ''}"


def _output(spec: ModelSpec) -> str:
    calibrated = "" if spec.temperature is None else f" at temperature {spec.temperature:.4g}"
    tensor = f"{spec.output}, float32 (N, {spec.output_size}), {spec.activation}{calibrated}"
    if spec.activation == "softmax":
        return tensor
    thresholds = sorted(set(spec.thresholds or (DEFAULT_THRESHOLD,)))
    scores = " to ".join(f"{threshold:g}" for threshold in dict.fromkeys((thresholds[0], thresholds[-1])))
    if spec.outputs == 1:
        return f"{tensor}: {spec.class_names[1]} from a score of {scores} on"
    return f"{tensor}: several labels, each from a score of {scores} on"


def _training(spec: ModelSpec) -> list[tuple[str, str]]:
    if (training := spec.training) is None:
        return []
    data = training.data
    recipe = [f"{key} {value}" for key, value in training.recipe.items() if value not in (None, False)]
    labels = f", labels of {data.labels}" if data.labels else ""
    held_out = f", {data.split_fraction:.0%} held out" if data.split_fraction else ""
    return [
        ("trained on", f"{data.name} ({data.train_images:,} images, {data.train_fingerprint[:12]}{labels})"),
        ("tested on", f"{data.name} ({data.test_images:,} images, {data.test_fingerprint[:12]}{held_out})"),
        ("test accuracy", f"{training.accuracy_text} after {training.epochs} epochs, seed {training.seed}"),
        ("recipe", ", ".join(recipe)),
        ("trained with", ", ".join(f"{name} {version}" for name, version in training.versions.items())),
    ]


def _export(spec: ModelSpec) -> list[tuple[str, str]]:
    """Return what the file was made from, and the facts about its export, one per line."""
    facts = []
    if spec.checkpoint_sha256:
        facts.append(("checkpoint", f"sha256 {spec.checkpoint_sha256}"))
    if spec.weights_sha256:
        facts.append(("weights", f"sha256 {spec.weights_sha256}"))
    if spec.minimum_onnxruntime:
        facts.append(("requires", f"ONNX Runtime >= {spec.minimum_onnxruntime}"))
    for position, (name, value) in enumerate((spec.exporter or {}).items()):
        facts.append(("" if position else "export", f"{name}: {value}"))
    return facts


def _parity(spec: ModelSpec) -> list[tuple[str, str]]:
    parity = spec.parity
    if parity is None or parity.max_abs_error is None:
        return []
    sizes = ", ".join(map(str, parity.batch_sizes))
    splits = f"{parity.test_images} test and {parity.training_images} training " if parity.training_images else ""
    images = f"{splits or f'{parity.images} '}images of {parity.data}"
    errors = f"max |Δ| {parity.max_abs_error:.2e}, agreement {parity.agreement:.4%}"
    return [
        ("parity", f"{errors} on {images}, batch sizes {sizes}, {parity.provider}"),
        *[("WARNING", warning) for warning in parity.warnings],
    ]
