"""The `cifarx optimize` command."""

import shlex
from typing import Annotated, Literal

import msgspec
import typer

from cifarx.model_flags import NO_MODEL_FLAGS, SOURCE_HELP, ModelFlags, model_options, takes_flags
from cifarx.options import (
    AllowChance,
    DataName,
    Json,
    Labels,
    OnError,
    SplitFraction,
    data_source,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, print_error
from cifarx_export.optimization.candidates import TARGETS, parse_targets
from cifarx_export.optimization.requirement import EXAMPLE, parse_requirement


@takes_flags(ModelFlags)
def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Checkpoint, or an ONNX file in fp32.")],
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help=SOURCE_HELP)] = None,
    flags: ModelFlags = NO_MODEL_FLAGS,
    require: Annotated[
        str, typer.Option(metavar="BOUNDS", help=f"What the pick must hold, such as {EXAMPLE}. [default: no bounds]")
    ] = "",
    prefer: Annotated[
        Literal["latency", "throughput", "size"], typer.Option(help="What is best among the candidates that hold it.")
    ] = "latency",
    targets: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help=f"Where the pick shall run: {', '.join(TARGETS)}.")
    ] = "cpu",
    minutes: Annotated[float, typer.Option(metavar="N", help="Time for the search.")] = 10,
    prune: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Also try the network without this share of its channels, such as 0.3."),
    ] = None,
    data: DataName = "auto",
    split: SplitFraction = None,
    labels: Labels = None,
    on_error: OnError = None,
    allow_chance_accuracy: AllowChance = False,
    json: Json = False,
) -> int:
    """Find the best format and precision for a network, and write that file.

    Each candidate is exported, proved by its parity check, and measured in turns with ONNX Runtime in fp32. A search
    that was ended goes on where it was.
    """
    from cifarx.optimization_report.html import write_html_report
    from cifarx.optimization_report.table import print_report
    from cifarx_export.optimization.optimize import optimize

    parse_requirement(require)  # before the slow imports and the long work
    report = optimize(
        file,
        require=require,
        prefer=prefer,
        targets=parse_targets(targets),
        minutes=minutes,
        prune=prune,
        model=model_options(model, flags),
        data=data_source(data, split, labels),
        on_error=resolve_on_error(on_error, None),
        allow_chance_accuracy=allow_chance_accuracy,
        progress=note,
    )
    page = write_html_report(report)
    if json:
        json_result({**msgspec.to_builtins(report), "report": str(page)})
    else:
        print_report(report)
    note(f"wrote {page}")
    if report.file is None:
        print_error(f"no file was written: {report.reason}")
        return 1
    note(f"next: cifarx infer IMAGE --model {shlex.quote(report.file)}")
    return 0
