"""`cifarx infer`: no PyTorch for an ONNX file, and nothing else on the way that costs start-up time."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cifarx.options import DeviceName, Json
from cifarx.output.console import note
from cifarx.output.predictions import Layout, answer_writer
from cifarx_serve.backends.registry import find_model
from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.images.paths import STANDARD_INPUT, find_images
from cifarx_serve.images.reader import ImageSource
from cifarx_serve.predictor import Prediction, Predictor, load

if TYPE_CHECKING:
    from cifarx.output.contact_sheet import ContactSheet

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
    annotate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the images with their labels and scores there, as .png or .jpg."),
    ] = None,
) -> int:
    """Classify images."""
    layout = _layout(json=json, jsonl=jsonl, csv=csv)
    names = list(find_images(images))
    sheet = _sheet(annotate, names)
    sources = _Sources(twice=sheet is not None)
    path = model or str(find_model(Path(), backend or "onnxruntime"))
    with load(path, backend, device) as predictor:
        introduction = _introduce(predictor, path)
        facts = {"model": path, "backend": predictor.backend, "provider": predictor.provider}
        answers = _shown(_answers(predictor, names, sources, top_k), len(names))
        answered = 0
        with closing(answer_writer(layout, facts, top_k)) as writer:
            for name, answer in zip(names, answers, strict=True):
                if not answered and isinstance(answer, Prediction):
                    note(f"note: {introduction}")
                answered += isinstance(answer, Prediction)
                if isinstance(answer, ImageError):
                    note(f"error: {answer}")
                writer.write(name, answer)
                if sheet:
                    sheet.add(name, sources.again(name), answer)
        if sheet:
            sheet.write(predictor.spec.model, introduction)
            note(f"wrote {annotate}")
    if answered == len(names):
        return 0
    return 1 if answered else 2


def _layout(*, json: bool, jsonl: bool, csv: bool) -> Layout:
    asked: list[Layout] = [name for name, given in (("json", json), ("jsonl", jsonl), ("csv", csv)) if given]  # type: ignore[misc]
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)} together", "give one of them")
    return asked[0] if asked else "text"


def _sheet(target: Path | None, names: list[str]) -> "ContactSheet | None":
    """The contact sheet that is asked for; it takes the place of no image that it shows."""
    if target is None:
        return None
    from cifarx.output.contact_sheet import ContactSheet  # drawing is imported where something is drawn

    sheet = ContactSheet(target)
    if target.exists() and any(_is_same(target, name) for name in names):
        raise UsageError(f"--annotate {target} would overwrite one of the images", "name another, or remove it")
    return sheet


def _is_same(target: Path, name: str) -> bool:
    with suppress(OSError, ValueError):  # one that cannot be read is told when its turn comes
        return target.samefile(name)
    return False


class _Sources:
    """Where images are read from, `twice` if they are drawn too: what a pipe gives is kept for the second time."""

    def __init__(self, *, twice: bool) -> None:
        self._twice = twice
        self._kept: dict[str, bytes] = {}

    def first(self, name: str) -> ImageSource:
        """The file itself, or what came through a pipe."""
        content = sys.stdin.buffer.read() if name == STANDARD_INPUT else self._piped(name)
        if content is None:
            return name
        if self._twice:
            self._kept[name] = content
        return content

    def again(self, name: str) -> ImageSource:
        """The same, for the last time."""
        return self._kept.pop(name, name)

    def _piped(self, name: str) -> bytes | None:
        """What comes through a named pipe, as that of a shell's `<(command)`, where it is asked for twice."""
        with suppress(OSError, ValueError):  # as above
            if self._twice and Path(name).is_fifo():
                return Path(name).read_bytes()
        return None


def _answers(
    predictor: Predictor, names: list[str], sources: _Sources, top_k: int
) -> Iterator[Prediction | ImageError]:
    """One image is read here: threads would cost it their start."""
    if len(names) > 1:
        yield from predictor.predict_stream(map(sources.first, names), top_k)
        return
    try:
        yield predictor.predict(sources.first(names[0]), top_k)
    except ImageError as error:
        yield error


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
    return f"{path} ({predictor.spec.model}{origin}) by {predictor.backend} on {predictor.provider}"
