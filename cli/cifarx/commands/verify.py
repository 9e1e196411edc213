"""The `cifarx verify` command."""

from typing import Annotated

import msgspec
import typer

from cifarx.model_flags import NO_MODEL_FLAGS, SOURCE_HELP, ModelFlags, model_options, takes_flags
from cifarx.options import (
    AbsoluteTolerance,
    AllowChance,
    Broken,
    DataName,
    DeviceName,
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
from cifarx.signatures import RequiredKey, check_signature


@takes_flags(ModelFlags)
def command(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="Artifact or checkpoint to check.")],
    reference: Annotated[
        str | None, typer.Argument(metavar="[REFERENCE]", help="File to compare with, instead of --ckpt.")
    ] = None,
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", metavar="FILE", help="Checkpoint to compare with, a .pth file.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help=SOURCE_HELP)] = None,
    flags: ModelFlags = NO_MODEL_FLAGS,
    data: DataName = "auto",
    split: SplitFraction = None,
    labels: Labels = None,
    on_error: OnError = None,
    broken: Broken = None,
    device: DeviceName = "cpu",
    batch: Annotated[int | None, typer.Option(help="Batch size to check in addition to 1, 3 and 64.")] = None,
    locate: Annotated[bool, typer.Option("--locate", help="Find the first layer whose output differs.")] = False,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="RUNTIME",
            help="Run an ONNX file in another runtime than ONNX Runtime: opencv, openvino, tract or web.",
        ),
    ] = None,
    require_signature: RequiredKey = None,
    html_report: HtmlReport = None,
    atol: AbsoluteTolerance = None,
    rtol: RelativeTolerance = None,
    allow_chance_accuracy: AllowChance = False,
    json: Json = False,
) -> int:
    """Check the parity of two files.

    Compare an artifact with its checkpoint or with any other file, on any data. The exit status is 1 if a check fails.
    With --require-signature, the signature is checked first, and nothing else if there is no file to compare with.
    """
    from cifarx_export.verify import verify

    signature, signature_holds = check_signature(artifact, require_signature)
    if not signature_holds or (require_signature and not (reference or ckpt or model)):
        if json:
            json_result([{"artifact": artifact, "signature": signature}])
        return 0 if signature_holds else 1
    report = verify(
        artifact,
        reference,
        checkpoint=ckpt,
        model=model_options(model, flags),
        data=data_source(data, split, labels),
        on_error=resolve_on_error(on_error, broken),
        device=device,
        batch_size=batch,
        locate=locate,
        runtime=runtime,
        html_report=html_report,
        atol=atol,
        rtol=rtol,
        allow_chance_accuracy=allow_chance_accuracy,
        progress=note,
    )
    if json:
        json_result([{**msgspec.structs.asdict(report.row()), "signature": signature}])
    else:
        from cifarx.output.parity import parity_lines

        styled_result(parity_lines(report))
    if html_report:
        note(f"wrote {html_report}")
    if json and locate:
        for check in report.checks:
            if check.name == "layer":
                note(f"note: {check.found}")
    failed = ", ".join(check.name for check in report.checks if not check.passed)
    if failed:
        where, remedy = (f" in {runtime}", "use another --runtime") if runtime else ("", "export it again")
        print_error(f"{artifact} differs from {reference or ckpt}{where} (failed checks: {failed}): {remedy}")
    return 1 if failed else 0
