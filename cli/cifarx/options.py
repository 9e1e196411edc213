"""Options that several commands share, so that they read and mean the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
DeviceName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N, mps, or for ONNX files tensorrt, tensorrt:N; only auto may fall back.",
    ),
]
DataName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="auto, cifar10, builtin, or the path of a folder or .tar.gz with train/CLASS/ and test/CLASS/.",
    ),
]
Broken: TypeAlias = Annotated[
    Literal["refuse", "skip"],
    typer.Option("--broken", help="Images that cannot be read: refuse the data, or skip them."),
]
Checkpoint: TypeAlias = Annotated[
    str,
    typer.Option(
        "--ckpt", metavar="FILE", help="The checkpoint that `cifarx train` wrote, or a .pth file of torch.save."
    ),
]
ModelName: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Architecture of a .pth file that does not say it itself."),
]
ReportPage: TypeAlias = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Write the proof as a page: errors, classes, the worst images."),
]
AbsoluteTolerance: TypeAlias = Annotated[
    float | None, typer.Option("--atol", help="Absolute tolerance of a logit. [default: by precision]")
]
RelativeTolerance: TypeAlias = Annotated[
    float | None, typer.Option("--rtol", help="Relative tolerance of a logit. [default: by precision]")
]
