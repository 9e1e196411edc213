"""`cifarx inspect`"""

from typing import Annotated

import typer

from cifarx.console import json_result, result
from cifarx.options import Json
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.spec import ModelSpec


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint or artifact.")],
    json: Json = False,
) -> None:
    """Print what a checkpoint or artifact says about itself."""
    spec = read_spec(file)
    if json:
        json_result(spec)
    else:
        result("\n".join(f"{name:<14} {value}" for name, value in _facts(spec)))


def _facts(spec: ModelSpec) -> list[tuple[str, str]]:
    taken = spec.input
    facts = [
        ("model", f"{spec.model}{', small stem' if spec.stem == 'small' else ''}, {spec.precision}"),
        ("classes", f"{len(spec.class_names)}: {', '.join(spec.class_names)}"),
        ("input", f"{taken.dtype} {taken.layout} (N, {taken.channels}, {taken.height}, {taken.width}), {taken.colour}"),
        ("preprocessing", f"resize {taken.resize}, range {taken.value_range}, mean {taken.mean}, std {taken.std}"),
        ("output", spec.output),
    ]
    if training := spec.training:
        data = training.data
        facts += [
            ("trained on", f"{data.name} ({data.train_images:,} images, {data.train_fingerprint[:12]})"),
            ("tested on", f"{data.name} ({data.test_images:,} images, {data.test_fingerprint[:12]})"),
            ("test accuracy", f"{training.accuracy_text} after {training.epochs} epochs, seed {training.seed}"),
            (
                "recipe",
                ", ".join(f"{key} {value}" for key, value in training.recipe.items() if value not in (None, False)),
            ),
            ("trained with", ", ".join(f"{name} {version}" for name, version in training.versions.items())),
        ]
    if spec.checkpoint_sha256:
        facts.append(("checkpoint", f"sha256 {spec.checkpoint_sha256}"))
    if (parity := spec.parity) and parity.max_abs_error is not None:
        facts.append(
            (
                "proof",
                f"max |Δ| {parity.max_abs_error:.2e}, agreement {parity.agreement:.4%} on {parity.images} images of "
                f"{parity.data}, batches {', '.join(map(str, parity.batch_sizes))}, {parity.provider}",
            )
        )
    return facts
