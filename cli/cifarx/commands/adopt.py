"""The `cifarx adopt` command."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cifarx.model_flags import NO_FILE_FLAGS, FileFlags, spec_overrides, takes_flags
from cifarx.options import (
    AllowChance,
    DataName,
    HtmlReport,
    Json,
    Labels,
    OnError,
    SplitFraction,
    data_source,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, print_error, styled_result
from cifarx.signatures import SigningKey, open_signer, sign_artifact


@takes_flags(FileFlags)
def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="ONNX or TorchScript file of another program.")],
    flags: FileFlags = NO_FILE_FLAGS,
    data: DataName = "auto",
    split: SplitFraction = None,
    labels: Labels = None,
    on_error: OnError = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The adopted file. [default: NAME.adopted.onnx, next to FILE]")
    ] = None,
    sign: SigningKey = None,
    html_report: HtmlReport = None,
    allow_chance_accuracy: AllowChance = False,
    json: Json = False,
) -> int:
    """Adopt a classifier that another program wrote.

    The adopted file contains its weights and its model spec, takes batches of any size, and works in every other
    command. It is written only if it predicts the same as the given file on real images.
    """
    from cifarx_export.adoption.adopt import adopt

    signer = open_signer(sign)
    adopted = adopt(
        file,
        overrides=spec_overrides(flags),
        data=data_source(data, split, labels),
        on_error=resolve_on_error(on_error, None),
        out=out,
        html_report=html_report,
        allow_chance_accuracy=allow_chance_accuracy,
        progress=note,
    )
    passed = adopted.report.summary.passed
    if json:
        json_result([adopted.report.row()])
    else:
        from cifarx.output.parity import parity_lines

        styled_result(parity_lines(adopted.report))
    if passed:
        note(f"wrote {adopted.path} ({adopted.path.stat().st_size:,} bytes) and {adopted.report_path.name}")
        sign_artifact(signer, adopted.path)
        note(f"next: cifarx infer IMAGE --model {shlex.quote(str(adopted.path))}")
    else:
        print_error(f"{adopted.path} failed the parity check and was not written: see {adopted.report_path}")
    if html_report:
        note(f"wrote {html_report}")
    return 0 if passed else 1
