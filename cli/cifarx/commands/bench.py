"""The `cifarx bench` command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cifarx.bench_report.baseline import DEFAULT_LIMIT
from cifarx.bench_report.pick import EXAMPLE, describe_pick, explain_no_pick, parse_bounds, pick
from cifarx.model_flags import (
    NO_MODEL_FLAGS,
    SOURCE_HELP,
    ModelFlags,
    is_checkpoint,
    note_description,
    read_stated_spec,
    stated_options,
    takes_flags,
)
from cifarx.options import (
    Broken,
    DataName,
    DeviceName,
    Json,
    Labels,
    OnError,
    SplitFraction,
    data_source,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, result
from cifarx_serve.errors import UsageError

if TYPE_CHECKING:
    from cifarx_serve.benchmarking.benchmark import BenchmarkReport
    from cifarx_train.data.selection import DataSource
    from cifarx_train.models.options import ModelOptions


@takes_flags(ModelFlags)
def command(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Checkpoints and artifacts with the same input size.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="SOURCE", help=f"{SOURCE_HELP} For the checkpoints among the files.")
    ] = None,
    flags: ModelFlags = NO_MODEL_FLAGS,
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Batch sizes to measure.")] = "1,64",
    device: DeviceName = "auto",
    data: DataName = "auto",
    split: SplitFraction = None,
    labels: Labels = None,
    on_error: OnError = None,
    broken: Broken = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Also write the report to a .json, .csv, .md, .html or .png file. Repeatable."
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Compare with an earlier JSON report, and fail if a file became slower."
        ),
    ] = None,
    max_regression: Annotated[
        str, typer.Option(metavar="PERCENT", help="Largest increase of a median latency over the baseline that passes.")
    ] = DEFAULT_LIMIT,
    pick_bounds: Annotated[
        str | None,
        typer.Option(
            "--pick",
            metavar="BOUNDS",
            help=f"Pick the row with the highest throughput within bounds, such as {EXAMPLE}.",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Benchmark model files side by side.

    Measure latency and throughput, and compare the predictions with those of the first file.
    """
    from cifarx.bench_report.baseline import compare, parse_limit, print_comparison, read_baseline
    from cifarx.bench_report.writers import print_report, require_report_path, write_report

    bounds = parse_bounds(pick_bounds) if pick_bounds is not None else ()
    limit, earlier = parse_limit(max_regression), read_baseline(baseline) if baseline else None
    batch_sizes = _parse_batch_sizes(batch)
    for path in report or []:
        require_report_path(path)
    options = stated_options(files, model, flags)
    source = data_source(data, split, labels)
    measured = _measure(files, options, batch_sizes, device, source, resolve_on_error(on_error, broken))
    for path in report or []:
        write_report(measured, path)
        note(f"wrote {path}")
    comparison = compare(measured, earlier, limit) if earlier else None
    picked = pick(measured.rows, bounds) if bounds else None
    if json:
        extra = {"changes": comparison.changes if comparison else None, "picked": picked}
        json_result({**_fields(measured), **{name: value for name, value in extra.items() if value is not None}})
    else:
        print_report(measured)
        if comparison:
            print_comparison(comparison, limit)
        if picked:
            result(describe_pick(picked))
    if bounds and not picked:
        note(explain_no_pick(measured.rows, bounds))
    return 1 if (comparison and not comparison.passed) or (bounds and not picked) else 0


def _measure(
    files: list[str],
    options: "ModelOptions | None",
    batches: list[int],
    device: str,
    data: "DataSource",
    on_error: Literal["raise", "skip"],
) -> "BenchmarkReport":
    from cifarx_export.parity.data import load_parity_data
    from cifarx_serve.benchmarking.benchmark import benchmark

    spec = read_stated_spec(files[0], options)
    if options is not None and is_checkpoint(files[0]):
        note_description(spec, files[0], options)
    loaded = load_parity_data(spec, data, on_error)
    paths = [Path(file) for file in files]
    return benchmark(
        paths,
        loaded.images,
        loaded.name,
        batches,
        device,
        labels=loaded.labels,
        progress=note,
        stated=options.to_document() if options else {},
        test_images=loaded.test_images,
        warnings=loaded.warnings(),
    )


def _fields(report: "BenchmarkReport") -> dict[str, object]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


def _parse_batch_sizes(text: str) -> list[int]:
    """Parse batch sizes such as `1,8,64`."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(
            f"cannot parse batch sizes {text!r}", "give integers separated by commas, such as 1,8,64"
        ) from error
