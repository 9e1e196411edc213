"""`cifarx inspect`"""

from pathlib import Path
from typing import Annotated

import typer

from cifarx.options import Json
from cifarx.output.console import json_result, result
from cifarx_serve.backends.base import require_file
from cifarx_serve.backends.registry import model_file, read_spec
from cifarx_serve.errors import CheckFailed, error_message
from cifarx_serve.files.checksum import SealState, damaged_member, read_seal
from cifarx_serve.spec import InputSpec, ModelSpec


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint or artifact.")],
    check: Annotated[bool, typer.Option("--check", help="Find out whether the file is as it was written.")] = False,
    json: Json = False,
) -> None:
    """Print what a checkpoint or artifact says about itself."""
    # First: a damaged file may say anything.
    checked = [("seal", _check(model_file(Path(file))))] if check else []
    spec = read_spec(file)
    if json:
        json_result(spec)
    else:
        result("\n".join(f"{name:<15} {value}" for name, value in [*_facts(spec), *checked]))


def _check(path: Path) -> str:
    """What holds the file together, in words.

    Raises:
        CheckFailed: it was changed, or has nothing to tell by.
    """
    require_file(path)
    seal = read_seal(path)
    if seal.state is SealState.CHANGED:
        raise CheckFailed(f"{path} was changed after it was sealed", "get it again from where it came, or export again")
    if seal.state is SealState.INTACT:
        return f"intact, sha256 {seal.sha256}"
    if path.suffix == ".pth":
        return _check_members(path)
    raise CheckFailed(f"{path} carries no seal", "it is cut off, or not of this `cifarx export`; export it again")


def _check_members(path: Path) -> str:
    """Of a checkpoint, the checksums that PyTorch writes with every member of the archive."""
    try:
        damaged = damaged_member(path)
    except Exception as error:  # what zipfile raises on damaged archives has no common base
        raise CheckFailed(
            f"{path} carries no seal and no checksums ({error_message(error)})", "train again, or save it anew"
        ) from error
    if damaged:
        raise CheckFailed(f"{path} was changed: {damaged} has another CRC-32", "get it again from where it came")
    return "none; the CRC-32 of every member holds (not of the bytes between them)"


def _facts(spec: ModelSpec) -> list[tuple[str, str]]:
    return [
        ("model", f"{spec.model}{', small stem' if spec.stem == 'small' else ''}, {spec.precision}"),
        ("classes", f"{len(spec.class_names)}: {', '.join(spec.class_names)}"),
        ("input", _input(spec)),
        ("preprocessing", _preprocessing(spec.input, spec.embedded_preprocessing)),
        ("output", f"{spec.output}, float32 (N, {len(spec.class_names)})"),
        *_training(spec),
        *_export(spec),
        *_proof(spec),
    ]


def _input(spec: ModelSpec) -> str:
    taken = spec.input
    if spec.embedded_preprocessing:
        return f"uint8 NHWC (N, any height, any width, {taken.channels}), {taken.color}"
    return f"{taken.dtype} {taken.layout} (N, {taken.channels}, {taken.height}, {taken.width}), {taken.color}"


def _preprocessing(taken: InputSpec, embedded: bool) -> str:
    size = f"resize {taken.resize} to {taken.height}x{taken.width}"
    numbers = f"range {taken.value_range}, mean {taken.mean}, std {taken.std}"
    return f"{size}, {numbers}, {'in the file itself' if embedded else 'before the model'}"


def _training(spec: ModelSpec) -> list[tuple[str, str]]:
    if (training := spec.training) is None:
        return []
    data = training.data
    recipe = [f"{key} {value}" for key, value in training.recipe.items() if value not in (None, False)]
    return [
        ("trained on", f"{data.name} ({data.train_images:,} images, {data.train_fingerprint[:12]})"),
        ("tested on", f"{data.name} ({data.test_images:,} images, {data.test_fingerprint[:12]})"),
        ("test accuracy", f"{training.accuracy_text} after {training.epochs} epochs, seed {training.seed}"),
        ("recipe", ", ".join(recipe)),
        ("trained with", ", ".join(f"{name} {version}" for name, version in training.versions.items())),
    ]


def _export(spec: ModelSpec) -> list[tuple[str, str]]:
    """What the file was made of, and every fact of how, one on a line."""
    facts = []
    if spec.checkpoint_sha256:
        facts.append(("checkpoint", f"sha256 {spec.checkpoint_sha256}"))
    if spec.weights_sha256:
        facts.append(("weights", f"sha256 {spec.weights_sha256}"))
    if spec.minimum_onnxruntime:
        facts.append(("needs", f"ONNX Runtime >= {spec.minimum_onnxruntime}"))
    for position, (name, value) in enumerate((spec.exporter or {}).items()):
        facts.append(("" if position else "export", f"{name}: {value}"))
    return facts


def _proof(spec: ModelSpec) -> list[tuple[str, str]]:
    parity = spec.parity
    if parity is None or parity.max_abs_error is None:
        return []
    batches = ", ".join(map(str, parity.batch_sizes))
    return [
        (
            "proof",
            f"max |Δ| {parity.max_abs_error:.2e}, agreement {parity.agreement:.4%} on {parity.images} images of "
            f"{parity.data}, batches {batches}, {parity.provider}",
        )
    ]
