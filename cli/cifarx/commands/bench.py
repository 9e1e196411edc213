"""`cifarx bench`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cifarx.bench_report.baseline import DEFAULT_LIMIT
from cifarx.bench_report.pick import EXAMPLE, nothing_line, parse_bounds, pick, picked_line
from cifarx.options import Broken, DataName, DeviceName, Json, OnError, resolve_on_error
from cifarx.output.console import json_result, note, result
from cifarx_serve.errors import UsageError

if TYPE_CHECKING:
    from cifarx_serve.benchmarking.benchmark import BenchmarkReport


def command(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Checkpoints and artifacts of one input size.")],
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Batch sizes.")] = "1,64",
    device: DeviceName = "auto",
    data: DataName = "auto",
    on_error: OnError = None,
    broken: Broken = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Write the report there too: .json, .csv, .md, .html, .png. Again for more."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="An earlier report: print the change, and fail where it is too much."),
    ] = None,
    max_regression: Annotated[
        str, typer.Option(metavar="PERCENT", help="How much more a median latency may be than the baseline's.")
    ] = DEFAULT_LIMIT,
    pick_bounds: Annotated[
        str | None,
        typer.Option("--pick", metavar="BOUNDS", help=f"Name what has most throughput within bounds: {EXAMPLE}."),
    ] = None,
    json: Json = False,
) -> int:
    """Measure files side by side: latency, throughput, and whether they agree with the first."""
    from cifarx.bench_report.baseline import compare, parse_limit, print_comparison, read_baseline
    from cifarx.bench_report.writers import print_report, require_report, write_report

    bounds = parse_bounds(pick_bounds) if pick_bounds is not None else ()
    limit, earlier = parse_limit(max_regression), read_baseline(baseline) if baseline else None
    batches = _batch_sizes(batch)
    for path in report or []:
        require_report(path)
    measured = _measure(files, batches, device, data, resolve_on_error(on_error, broken))
    for path in report or []:
        write_report(measured, path)
        note(f"wrote {path}")
    compared = compare(measured, earlier, limit) if earlier else None
    picked = pick(measured.rows, bounds) if bounds else None
    if json:
        further = {"changes": compared.changes if compared else None, "picked": picked}
        json_result({**_fields(measured), **{name: value for name, value in further.items() if value is not None}})
    else:
        print_report(measured)
        if compared:
            print_comparison(compared, limit)
        if picked:
            result(picked_line(picked))
    if bounds and not picked:
        note(nothing_line(measured.rows, bounds))
    return 1 if (compared and not compared.passed) or (bounds and not picked) else 0


def _measure(
    files: list[str], batches: list[int], device: str, data: str, on_error: Literal["raise", "skip"]
) -> "BenchmarkReport":
    from cifarx_serve.backends.registry import read_spec
    from cifarx_serve.benchmarking.benchmark import benchmark
    from cifarx_train.data.selection import select_dataset_for_model

    spec = read_spec(files[0])
    chosen = select_dataset_for_model(spec.training.data if spec.training else None, data, on_error)
    loaded = chosen.load("test", spec.input)
    paths = [Path(file) for file in files]
    return benchmark(paths, loaded.images, chosen.name, batches, device, labels=loaded.labels, progress=note)


def _fields(report: "BenchmarkReport") -> dict[str, object]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


def _batch_sizes(text: str) -> list[int]:
    """`1,8,64` as numbers."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"batch sizes {text!r}", "give whole numbers with commas between, such as 1,8,64") from error
