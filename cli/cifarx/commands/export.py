"""`cifarx export`"""

from pathlib import Path
from typing import Annotated

import typer

from cifarx.console import json_result, note, result
from cifarx.options import AbsoluteTolerance, Broken, Checkpoint, DataName, Json, ModelName, RelativeTolerance


def command(
    ckpt: Checkpoint,
    formats: Annotated[
        list[str], typer.Option("--format", metavar="NAME", help="onnx or torchscript; give it again for more.")
    ],
    model: ModelName = None,
    data: DataName = "auto",
    broken: Broken = "refuse",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder. [default: the checkpoint's]")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set. [default: 18]")] = None,
    atol: AbsoluteTolerance = None,
    rtol: RelativeTolerance = None,
    json: Json = False,
) -> int:
    """Make artifacts of a checkpoint, each proved on real images before it gets its name."""
    from cifarx_export.exporting import export
    from cifarx_export.formats import export_format

    for name in formats:
        if export_format(name).legacy:
            note(f"note: {name} is legacy, deprecated by PyTorch; prefer onnx where you can")
    made = export(
        ckpt, formats, model=model, data=data, broken=broken, out=out, opset=opset, atol=atol, rtol=rtol, progress=note
    )
    if json:
        json_result([artifact.report.row() for artifact in made])
    else:
        from cifarx.parity_lines import parity_lines

        result("\n".join(parity_lines(artifact.report) for artifact in made))
    for artifact in made:
        if artifact.report.summary.passed:
            size = artifact.path.stat().st_size
            note(f"wrote {artifact.path} ({size:,} bytes) and {artifact.report_path.name}")
            note(f"next: cifarx infer IMAGE --model {artifact.path}")
        else:
            note(f"error: {artifact.path} failed its proof and was not written: see {artifact.report_path}")
    return 0 if all(artifact.report.summary.passed for artifact in made) else 1
