"""The `cifarx diagnose` command."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cifarx.model_flags import NO_MODEL_FLAGS, SOURCE_HELP, ModelFlags, model_options, takes_flags
from cifarx.options import (
    Json,
    Labels,
    OnError,
    SplitFraction,
    data_source,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, result, styled_result

if TYPE_CHECKING:
    from cifarx_export.diagnosis.diagnose import Diagnosis
    from cifarx_train.data.selection import DataSource


@takes_flags(ModelFlags)
def command(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Checkpoint, or ONNX or TorchScript file, with or without a spec.")
    ],
    data: Annotated[
        str,
        typer.Option(metavar="DATA", help="Labeled images: cifar10, builtin, or the path of images, as for train."),
    ],
    split: SplitFraction = None,
    labels: Labels = None,
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help=SOURCE_HELP)] = None,
    flags: ModelFlags = NO_MODEL_FLAGS,
    images: Annotated[int, typer.Option(metavar="N", help="Largest number of images.")] = 1000,
    on_error: OnError = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Write the best preprocessing as a file for --spec.")
    ] = None,
    json: Json = False,
) -> None:
    """Find out how a network wants its images.

    Try the usual ways to scale, normalize and resize images, both orders of the colors, and orders of the classes, on
    labeled images. The ranking says how sure it is.
    """
    from cifarx.output.diagnosis import best_flags, diagnosis_lines, spec_document
    from cifarx_export.diagnosis.diagnose import diagnose
    from cifarx_serve.files.atomic import atomic_path, require_writable

    if out is not None:
        require_writable(out.parent)
    found = diagnose(
        file,
        model=model_options(model, flags),
        data=(source := data_source(data, split, labels)),
        images=images,
        on_error=resolve_on_error(on_error, None),
        progress=note,
    )
    options, document = best_flags(found), spec_document(found)
    if json:
        json_result({**msgspec.to_builtins(found), "flags": options, "spec_file": document})
    else:
        styled_result(diagnosis_lines(found))
        result("", *_next_step(found, file, model, source, options, document, out))
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(f"{document}\n", encoding="utf-8")
        note(f"wrote {out}")


def _next_step(
    found: "Diagnosis",
    file: str,
    model: str | None,
    data: "DataSource",
    options: str | None,
    document: str,
    out: Path | None,
) -> list[str]:
    """Return the command that uses the best preprocessing, after the file that it needs if options cannot state it."""
    if found.kind == "checkpoint":
        command = ["cifarx", "export", "--ckpt", file, *(["--model", model] if model else []), "--format", "onnx"]
    else:
        command = ["cifarx", "adopt", file]
    command += ["--data", data.name]
    command += [] if data.split_fraction is None else ["--split", f"{data.split_fraction:g}"]
    command += [] if data.labels is None else ["--labels", str(data.labels)]
    if options is not None:
        return [f"{shlex.join(command)} {options}"]
    path = out or Path("spec.toml")
    shown = [] if out else [f"{path}:", "", *(f"    {line}".rstrip() for line in document.splitlines()), ""]
    return [*shown, f"{shlex.join(command)} --spec {shlex.quote(str(path))}"]
