"""The `cifarx export` command."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cifarx.model_flags import NO_MODEL_FLAGS, SOURCE_HELP, ModelFlags, model_options, takes_flags
from cifarx.options import (
    AbsoluteTolerance,
    AllowChance,
    Broken,
    DataName,
    HtmlReport,
    Json,
    Labels,
    OnError,
    RelativeTolerance,
    SplitFraction,
    data_source,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, print_error, styled_result
from cifarx.signatures import SigningKey, open_signer, sign_artifact
from cifarx_export.formats.registry import FORMATS, PRECISIONS, ExportOptions, get_format
from cifarx_serve.errors import UsageError

_FORMATS_HELP = f"Format: {', '.join(FORMATS)}. Repeatable."
_PRECISIONS_HELP = f"Precision: {', '.join(PRECISIONS)}. Repeatable. [default: fp32]"


@takes_flags(ModelFlags)
def command(
    formats: Annotated[list[str], typer.Option("--format", metavar="NAME", help=_FORMATS_HELP)],
    ckpt: Annotated[
        str | None,
        typer.Option(
            "--ckpt",
            metavar="FILE",
            help="Checkpoint: any file with the weights, or a directory of Hugging Face. "
            "Not needed if --model brings its weights.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help=SOURCE_HELP)] = None,
    flags: ModelFlags = NO_MODEL_FLAGS,
    precisions: Annotated[
        list[str] | None,
        typer.Option("--precision", metavar="NAME", help=_PRECISIONS_HELP),
    ] = None,
    data: DataName = "auto",
    split: SplitFraction = None,
    labels: Labels = None,
    on_error: OnError = None,
    broken: Broken = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for the artifacts. [default: that of the checkpoint]")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset version, 11 to 23. [default: 18]")] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="Number of training images to calibrate int8 on. [default: 512]")
    ] = None,
    embed_preprocessing: Annotated[
        bool,
        typer.Option(
            "--embed-preprocessing",
            help="Include the preprocessing: the model takes uint8 images (N, H, W, 3) of any size.",
        ),
    ] = False,
    allow_chance_accuracy: AllowChance = False,
    batch: Annotated[int | None, typer.Option(help="Batch size to check in addition to 1, 3 and 64.")] = None,
    sign: SigningKey = None,
    html_report: HtmlReport = None,
    atol: AbsoluteTolerance = None,
    rtol: RelativeTolerance = None,
    json: Json = False,
) -> int:
    """Export a network and check its parity.

    An artifact is written only if it passes the parity check: it must predict the same as the checkpoint on real
    images.
    """
    from cifarx_export.export import export

    if ckpt is None and model is None:
        raise UsageError("--ckpt is missing", "give a checkpoint, such as --ckpt lzh_9.pth")
    for name in formats:
        if get_format(name).legacy:
            note(f"note: {name} is deprecated by PyTorch: use onnx if possible")
    signer = open_signer(sign)
    exported = export(
        ckpt,
        formats,
        precisions or ["fp32"],
        model=model_options(model, flags),
        data=data_source(data, split, labels),
        on_error=resolve_on_error(on_error, broken),
        out=out,
        options=ExportOptions(opset, calibration_images, embed_preprocessing or None),
        batch_size=batch,
        html_report=html_report,
        atol=atol,
        rtol=rtol,
        allow_chance_accuracy=allow_chance_accuracy,
        progress=note,
    )
    if json:
        json_result([artifact.report.row() for artifact in exported])
    else:
        from cifarx.output.parity import parity_lines

        styled_result("\n".join(parity_lines(artifact.report) for artifact in exported))
    for artifact in exported:
        if artifact.report.summary.passed:
            note(f"wrote {artifact.path} ({_size(artifact.path):,} bytes) and {artifact.report_path.name}")
            sign_artifact(signer, artifact.path)
            note(f"next: cifarx infer IMAGE --model {shlex.quote(str(artifact.path))}")
        else:
            print_error(f"{artifact.path} failed the parity check and was not written: see {artifact.report_path}")
    if html_report:
        note(f"wrote {html_report}")
    return 0 if all(artifact.report.summary.passed for artifact in exported) else 1


def _size(path: Path) -> int:
    """Return the size of an artifact in bytes, with all files of a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
