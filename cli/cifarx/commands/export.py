"""`cifarx export`"""

from pathlib import Path
from typing import Annotated

import typer

from cifarx.options import (
    AbsoluteTolerance,
    Broken,
    Checkpoint,
    DataName,
    Json,
    ModelName,
    OnError,
    RelativeTolerance,
    ReportPage,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, result
from cifarx_export.formats.registry import FORMATS, PRECISIONS, ExportOptions, export_format
from cifarx_serve.backends.registry import model_file

_FORMATS_HELP = f"{', '.join(FORMATS)}; repeat it for more."
_PRECISIONS_HELP = f"{', '.join(PRECISIONS)}; repeat it for more. [default: fp32]"


def command(
    ckpt: Checkpoint,
    formats: Annotated[list[str], typer.Option("--format", metavar="NAME", help=_FORMATS_HELP)],
    precisions: Annotated[
        list[str] | None,
        typer.Option("--precision", metavar="NAME", help=_PRECISIONS_HELP),
    ] = None,
    model: ModelName = None,
    data: DataName = "auto",
    on_error: OnError = None,
    broken: Broken = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder. [default: the checkpoint's]")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 18 to 23. [default: 18]")] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="Training images that int8 is calibrated on. [default: 512]")
    ] = None,
    embed_preprocessing: Annotated[
        bool,
        typer.Option("--embed-preprocessing", help="The model takes uint8 images of any size, (N, H, W, 3)."),
    ] = False,
    batch: Annotated[int | None, typer.Option(help="Prove this batch size too, beside 1, 3 and 64.")] = None,
    page: ReportPage = None,
    atol: AbsoluteTolerance = None,
    rtol: RelativeTolerance = None,
    json: Json = False,
) -> int:
    """Make artifacts of a checkpoint, each proved on real images before it gets its name."""
    from cifarx_export.export import export

    for name in formats:
        if export_format(name).legacy:
            note(f"note: {name} is legacy, deprecated by PyTorch; prefer onnx where you can")
    made = export(
        ckpt,
        formats,
        precisions or ["fp32"],
        model=model,
        data=data,
        on_error=resolve_on_error(on_error, broken),
        out=out,
        options=ExportOptions(opset, calibration_images, embed_preprocessing or None),
        batch=batch,
        html_report=page,
        atol=atol,
        rtol=rtol,
        progress=note,
    )
    if json:
        json_result([artifact.report.row() for artifact in made])
    else:
        from cifarx.output.parity import parity_lines

        result("\n".join(parity_lines(artifact.report) for artifact in made))
    for artifact in made:
        if artifact.report.summary.passed:
            size = model_file(artifact.path).stat().st_size
            note(f"wrote {artifact.path} ({size:,} bytes) and {artifact.report_path.name}")
            note(f"next: cifarx infer IMAGE --model {artifact.path}")
        else:
            note(f"error: {artifact.path} failed its proof and was not written: see {artifact.report_path}")
    if page:
        note(f"wrote {page}")
    return 0 if all(artifact.report.summary.passed for artifact in made) else 1
