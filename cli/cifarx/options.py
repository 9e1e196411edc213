"""The options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from cifarx_serve.errors import UsageError

if TYPE_CHECKING:
    from cifarx_train.data.selection import DataSource

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
DeviceName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Device to run on: auto, cpu, cuda, cuda:N or mps; tensorrt or tensorrt:N for ONNX files; "
        "gpu or npu, those of Intel, for OpenVINO files. "
        "Only auto falls back to another device.",
    ),
]
DataName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Dataset: auto, cifar10, builtin, or the path of images: a directory, .zip or .tar.gz with train/CLASS/ "
        "and test/CLASS/, Parquet files or WebDataset shards.",
    ),
]
SplitFraction: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--split",
        metavar="FRACTION",
        help="Hold out this part of the images of each class, such as 0.2, for --data without test images.",
    ),
]
Labels: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--labels", metavar="FILE.csv", help="Take the labels of the images in --data from a CSV file: path,label."
    ),
]
OnError: TypeAlias = Annotated[
    Literal["raise", "skip"] | None,
    typer.Option("--on-error", help="Raise an error for images that cannot be read, or skip them. [default: raise]"),
]
Broken: TypeAlias = Annotated[Literal["refuse", "skip"] | None, typer.Option("--broken", hidden=True)]
"""The former name of `--on-error`, which still works."""
HtmlReport: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE.html", help="Write the parity report as an HTML page with plots and the worst images."
    ),
]
AllowChance: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-chance-accuracy",
        help="Do not stop if the accuracy on labeled images is no better than chance, or better with another "
        "preprocessing than the one that is assumed.",
    ),
]
AbsoluteTolerance: TypeAlias = Annotated[
    float | None, typer.Option("--atol", help="Absolute tolerance for logits. [default: depends on the precision]")
]
RelativeTolerance: TypeAlias = Annotated[
    float | None, typer.Option("--rtol", help="Relative tolerance for logits. [default: depends on the precision]")
]


def data_source(data: str, split: float | None, labels: Path | None) -> "DataSource":
    """Return the dataset that `--data`, `--split` and `--labels` describe together."""
    from cifarx_train.data.selection import DataSource

    return DataSource(data, split, labels)


def resolve_on_error(
    on_error: Literal["raise", "skip"] | None, broken: Literal["refuse", "skip"] | None
) -> Literal["raise", "skip"]:
    """Return what to do about unreadable images, from `--on-error` or from `--broken`, its former name.

    Raises:
        UsageError: both options were given.
    """
    if on_error and broken:
        raise UsageError("--on-error and --broken were both given", "--broken is the old name: use --on-error alone")
    return on_error or ("skip" if broken == "skip" else "raise")
