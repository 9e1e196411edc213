"""`cifarx infer`: no PyTorch for an ONNX file, and nothing else on the way that costs start-up time."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Final

import typer

from cifarx.answer_writers import Layout, answer_writer
from cifarx.console import note
from cifarx.options import DeviceName, Json
from cifarx_serve.backends.registry import find_model
from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.image_files import STANDARD_INPUT, find_images
from cifarx_serve.images import ImageSource
from cifarx_serve.predictor import Prediction, Predictor, load

_MANY: Final = 100
"""Images from which on a bar is shown on a terminal."""


def command(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, folders, quoted patterns; - is standard input."),
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A checkpoint or artifact. [default: the newest here that the backend runs]"),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="onnxruntime, torchscript, exported_program, aot_inductor or pytorch. "
            "[default: by --model, else onnxruntime]",
        ),
    ] = None,
    device: DeviceName = "auto",
    top_k: Annotated[int, typer.Option(help="How many classes to give for an image.")] = 1,
    json: Json = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print a JSON document a line, an image each.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print a table of comma-separated values.")] = False,
) -> int:
    """Classify images."""
    layout = _layout(json=json, jsonl=jsonl, csv=csv)
    names = list(find_images(images))
    path = model or str(find_model(Path(), backend or "onnxruntime"))
    with load(path, backend, device) as predictor:
        facts = {"model": path, "backend": predictor.backend, "provider": predictor.provider}
        answers = _shown(_answers(predictor, names, top_k), len(names))
        answered = 0
        with closing(answer_writer(layout, facts, top_k)) as writer:
            for name, answer in zip(names, answers, strict=True):
                if not answered and isinstance(answer, Prediction):
                    note(_introduce(predictor, path))
                answered += isinstance(answer, Prediction)
                if isinstance(answer, ImageError):
                    note(f"error: {answer}")
                writer.write(name, answer)
    if answered == len(names):
        return 0
    return 1 if answered else 2


def _layout(*, json: bool, jsonl: bool, csv: bool) -> Layout:
    asked: list[Layout] = [name for name, given in (("json", json), ("jsonl", jsonl), ("csv", csv)) if given]  # type: ignore[misc]
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)} together", "give one of them")
    return asked[0] if asked else "text"


def _answers(predictor: Predictor, names: list[str], top_k: int) -> Iterator[Prediction | ImageError]:
    """One image is read here: threads would cost it their start."""
    if len(names) > 1:
        yield from predictor.predict_stream(map(_source, names), top_k)
        return
    try:
        yield predictor.predict(_source(names[0]), top_k)
    except ImageError as error:
        yield error


def _source(name: str) -> ImageSource:
    return sys.stdin.buffer.read() if name == STANDARD_INPUT else name


def _shown(answers: Iterator[Prediction | ImageError], count: int) -> Iterable[Prediction | ImageError]:
    """With a bar for many images, where it does not run through the answers themselves."""
    if count < _MANY or not sys.stderr.isatty() or sys.stdout.isatty():
        return answers
    from rich.console import Console
    from rich.progress import track

    return track(answers, "classifying", count, console=Console(stderr=True), transient=True)


def _introduce(predictor: Predictor, path: str) -> str:
    """What runs, on what, and what it was trained on: nobody should take drawings for photographs."""
    training = predictor.spec.training
    origin = f", trained on {training.data.name}, {training.accuracy_text} there" if training else ""
    return f"note: {path} ({predictor.spec.model}{origin}) by {predictor.backend} on {predictor.provider}"
