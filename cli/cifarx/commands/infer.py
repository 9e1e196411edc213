"""The `cifarx infer` command. Its start-up time is part of the product: imports that are not always needed are lazy."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from itertools import chain, tee
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
        list[str] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, directories or quoted patterns; - is standard input."),
    ] = None,
    path_list: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Also classify the files that are listed in FILE, one path per line; - is standard input.",
        ),
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="The paths of --from are separated by NUL bytes, as of find -print0.")
    ] = False,
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
            help="Backend: onnxruntime, torchscript, exported_program, aot_inductor, openvino, executorch, litert, web "
            "or pytorch. [default: the one for --model, or onnxruntime]",
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
    named = list(find_images(images or []))
    listed = _listed(path_list, named, null=null)
    sheet = _contact_sheet(annotate, named)
    sources = _ImageSources(twice=sheet is not None)
    path = ckpt or model or str(find_model(Path(), backend or "onnxruntime"))
    with _open(path, model if ckpt else None, backend, device, flags) as predictor:
        description = _describe_model(predictor, path)
        facts = {"model": path, "backend": predictor.backend, "provider": predictor.provider}
        names, ahead = tee(chain(named, listed))  # the images are read a few batches ahead
        predictions = _predict(predictor, ahead, sources, top_k, single=path_list is None and len(named) == 1)
        count = len(named) if path_list is None else None
        classified = predicted = 0
        with closing(prediction_writer(output_format, facts, top_k, predictor.spec.multi_label)) as writer:
            for name, prediction in zip(names, _with_progress_bar(predictions, count), strict=True):
                classified += 1
                if not predicted and isinstance(prediction, Prediction):
                    note(f"note: {description}")
                    if assumption := predictor.spec.assumption:
                        note(f"note: {assumption}")
                predicted += isinstance(prediction, Prediction)
                if isinstance(prediction, ImageError):
                    print_error(str(prediction))
                writer.write(name, prediction)
                if sheet and annotate:
                    _require_other_file(annotate, name)  # a listed one is known only now
                    sheet.add(name, sources.read_again(name), prediction)
        if not classified:
            raise UsageError(f"no paths in {path_list}", "list one path per line")
        if sheet:
            sheet.write(predictor.spec.model, description)
            note(f"wrote {annotate}")
    if not predicted and len(named) == 1 and named[0].endswith(".txt"):
        note(f"note: if {named[0]} is a list of paths, give it with --from")
    if predicted == classified:
        return 0
    return 1 if predicted else 2


def _listed(path_list: str | None, named: list[str], *, null: bool) -> Iterator[str]:
    """Yield the paths in the list of --from.

    Raises:
        UsageError: there is neither a list nor a named image, or standard input is named twice.
    """
    if path_list is None:
        if null:
            raise UsageError("--null was given without --from", "give the list of paths with --from FILE")
        if not named:
            raise UsageError("no image was given", "name image files, or a list of them with --from FILE")
        return iter(())
    if path_list == STANDARD_INPUT and STANDARD_INPUT in named:
        raise UsageError("standard input was named twice", "give - once")
    from cifarx_serve.images.path_list import read_path_list  # few commands have a list

    file = sys.stdin.buffer if path_list == STANDARD_INPUT else Path(path_list)
    paths = read_path_list(file, null_separated=null)
    return (f"./{path}" if path == STANDARD_INPUT else path for path in paths)  # a list has files alone


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
    for name in names:
        _require_other_file(target, name)
    return sheet


def _require_other_file(target: Path, name: str) -> None:
    """Check that the contact sheet does not overwrite an image.

    Raises:
        UsageError: it does.
    """
    with suppress(OSError, ValueError):  # an unreadable image is reported when it is read
        if target.samefile(name):
            problem = f"--annotate {target} would overwrite one of the images"
            raise UsageError(problem, "give another name, or remove it")


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
    predictor: Predictor, names: Iterator[str], sources: _ImageSources, top_k: int, *, single: bool
) -> Iterator[Prediction | ImageError]:
    """Yield the predictions. A single image is not streamed, which avoids starting threads."""
    if not single:
        yield from predictor.predict_stream(map(sources.read, names), top_k)
        return
    try:
        yield predictor.predict(sources.read(next(names)), top_k)
    except ImageError as error:
        yield error


def _with_progress_bar(
    predictions: Iterator[Prediction | ImageError], count: int | None
) -> Iterable[Prediction | ImageError]:
    """Show a progress bar for many images, unless the predictions are printed to the same terminal.

    Args:
        predictions: the predictions.
        count: the number of images; None if it is not known.
    """
    few = count is not None and count < _PROGRESS_THRESHOLD
    if few or not sys.stderr.isatty() or sys.stdout.isatty():
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
