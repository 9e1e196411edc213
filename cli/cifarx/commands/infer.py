"""The `cifarx infer` command. Its start-up time is part of the product: imports that are not always needed are lazy."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cifarx.model_flags import NO_MODEL_FLAGS, ModelFlags, note_description, stated_options, takes_flags
from cifarx.options import DeviceName, Json
from cifarx.output.console import note, print_error
from cifarx.output.predictions import OutputFormat, prediction_writer
from cifarx_serve.backends.registry import find_model, model_file
from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.files.regular_file import open_file_or_pipe
from cifarx_serve.images.paths import STANDARD_INPUT, find_images
from cifarx_serve.images.reader import MAX_BYTES, ImageSource
from cifarx_serve.predictor import Prediction, Predictor, load

if TYPE_CHECKING:
    from cifarx.output.contact_sheet import ContactSheet

_PROGRESS_THRESHOLD: Final = 100
"""The number of images from which a terminal shows a progress bar."""


@takes_flags(ModelFlags)
def command(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, directories or quoted patterns; - is standard input."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Checkpoint or artifact; with --ckpt, the network of the checkpoint, such as FILE.py:CALLABLE. "
            "[default: the newest file here that the backend can run]",
        ),
    ] = None,
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", metavar="FILE", help="Checkpoint, if --model names its network.")
    ] = None,
    flags: ModelFlags = NO_MODEL_FLAGS,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Backend: onnxruntime, torchscript, exported_program, aot_inductor or pytorch. "
            "[default: the one for --model, or onnxruntime]",
        ),
    ] = None,
    device: DeviceName = "auto",
    top_k: Annotated[int, typer.Option(help="Number of classes to print per image.")] = 1,
    json: Json = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one line of JSON per image.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    annotate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the images with their labels and scores into a .png, .jpg or .webp file."
        ),
    ] = None,
) -> int:
    """Classify images."""
    output_format = _output_format(json=json, jsonl=jsonl, csv=csv)
    names = list(find_images(images))
    sheet = _contact_sheet(annotate, names)
    sources = _ImageSources(twice=sheet is not None)
    path = ckpt or model or str(find_model(Path(), backend or "onnxruntime"))
    with _open(path, model if ckpt else None, backend, device, flags) as predictor:
        description = _describe_model(predictor, path)
        facts = {"model": path, "backend": predictor.backend, "provider": predictor.provider}
        predictions = _with_progress_bar(_predict(predictor, names, sources, top_k), len(names))
        predicted = 0
        with closing(prediction_writer(output_format, facts, top_k, predictor.spec.multi_label)) as writer:
            for name, prediction in zip(names, predictions, strict=True):
                if not predicted and isinstance(prediction, Prediction):
                    note(f"note: {description}")
                    if assumption := predictor.spec.assumption:
                        note(f"note: {assumption}")
                predicted += isinstance(prediction, Prediction)
                if isinstance(prediction, ImageError):
                    print_error(str(prediction))
                writer.write(name, prediction)
                if sheet:
                    sheet.add(name, sources.read_again(name), prediction)
        if sheet:
            sheet.write(predictor.spec.model, description)
            note(f"wrote {annotate}")
    if predicted == len(names):
        return 0
    return 1 if predicted else 2


def _open(path: str, network: str | None, backend: str | None, device: str, flags: ModelFlags) -> Predictor:
    """Open a file, or a checkpoint with what the options state about it."""
    options = stated_options([path], network, flags)
    if options is None and not model_file(Path(path)).is_dir():
        return load(path, backend, device)
    if backend not in (None, "pytorch"):
        raise UsageError(f"backend {backend} does not open the checkpoint {path}", "leave out --backend")
    from cifarx_serve.devices import parse_device
    from cifarx_train.pytorch_backend import PyTorchBackend

    opened = PyTorchBackend(Path(path), parse_device(device), options)
    if options is not None:
        note_description(opened.spec, path, options)
    return Predictor(opened)


def _output_format(*, json: bool, jsonl: bool, csv: bool) -> OutputFormat:
    chosen: list[OutputFormat] = [name for name, given in (("json", json), ("jsonl", jsonl), ("csv", csv)) if given]  # type: ignore[misc]
    if len(chosen) > 1:
        raise UsageError(f"--{' and --'.join(chosen)} were given together", "choose one of them")
    return chosen[0] if chosen else "text"


def _contact_sheet(target: Path | None, names: list[str]) -> "ContactSheet | None":
    """Return the contact sheet for --annotate, which must not overwrite any of the images."""
    if target is None:
        return None
    from cifarx.output.contact_sheet import ContactSheet

    sheet = ContactSheet(target)
    if target.exists() and any(_is_same_file(target, name) for name in names):
        raise UsageError(f"--annotate {target} would overwrite one of the images", "give another name, or remove it")
    return sheet


def _is_same_file(target: Path, name: str) -> bool:
    with suppress(OSError, ValueError):  # an unreadable image is reported when it is read
        return target.samefile(name)
    return False


class _ImageSources:
    """Resolve image names to sources.

    If `twice` is set, the content of pipes is kept, so that it can be read again for the contact sheet.
    """

    def __init__(self, *, twice: bool) -> None:
        self._twice = twice
        self._contents: dict[str, bytes] = {}

    def read(self, name: str) -> ImageSource:
        """Return the path of a file, or the content of a pipe."""
        content = sys.stdin.buffer.read(MAX_BYTES + 1) if name == STANDARD_INPUT else self._read_pipe(name)
        if content is None:
            return name
        if self._twice:
            self._contents[name] = content
        return content

    def read_again(self, name: str) -> ImageSource:
        """Return the source again and discard the kept content."""
        return self._contents.pop(name, name)

    def _read_pipe(self, name: str) -> bytes | None:
        """Return the content of a named pipe, such as the shell's `<(command)`, if it is needed twice."""
        with suppress(OSError, ValueError):  # an unreadable image is reported when it is read
            if self._twice and Path(name).is_fifo():
                with open_file_or_pipe(name) as pipe:
                    return pipe.read(MAX_BYTES + 1)
        return None


def _predict(
    predictor: Predictor, names: list[str], sources: _ImageSources, top_k: int
) -> Iterator[Prediction | ImageError]:
    """Yield the predictions. A single image is not streamed, which avoids starting threads."""
    if len(names) > 1:
        yield from predictor.predict_stream(map(sources.read, names), top_k)
        return
    try:
        yield predictor.predict(sources.read(names[0]), top_k)
    except ImageError as error:
        yield error


def _with_progress_bar(predictions: Iterator[Prediction | ImageError], count: int) -> Iterable[Prediction | ImageError]:
    """Show a progress bar for many images, unless the predictions are printed to the same terminal."""
    if count < _PROGRESS_THRESHOLD or not sys.stderr.isatty() or sys.stdout.isatty():
        return predictions
    from rich.console import Console
    from rich.progress import track

    return track(predictions, "classifying", count, console=Console(stderr=True), transient=True)


def _describe_model(predictor: Predictor, path: str) -> str:
    """Return a line about the model, what it was trained on, and what runs it."""
    training = predictor.spec.training
    origin = ""
    if training:
        tested = "" if training.test_accuracy is None else "test accuracy "
        origin = f", trained on {training.data.name}, {tested}{training.accuracy_text}"
    return f"{path} ({predictor.spec.model}{origin}) with {predictor.backend} on {predictor.provider}"
