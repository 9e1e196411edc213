"""`cifarx infer`: no PyTorch for an ONNX file, and nothing else on the way that costs start-up time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cifarx.console import json_result, note, result
from cifarx.options import DeviceName, Json
from cifarx_serve.backends.registry import find_model
from cifarx_serve.errors import ImageError
from cifarx_serve.images import read_image
from cifarx_serve.predictor import Prediction, Predictor, load

_BATCH: Final = 64


def command(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, any that Pillow reads.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A checkpoint or artifact. [default: the newest here that the backend runs]"),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="onnxruntime, torchscript or pytorch. [default: by --model, else onnxruntime]"
        ),
    ] = None,
    device: DeviceName = "auto",
    top_k: Annotated[int, typer.Option(help="How many classes to give for an image.")] = 1,
    json: Json = False,
) -> int:
    """Classify images."""
    path = model or str(find_model(Path(), backend or "onnxruntime"))
    with load(path, backend, device) as predictor:
        documents: list[dict[str, Any]] = []
        answered = 0
        for image, answer in _classify(predictor, images, top_k):
            if isinstance(answer, ImageError):
                note(f"error: {answer}")
                documents.append({"image": image, "error": str(answer)})
                continue
            if not answered:
                note(_introduce(predictor, path))
            answered += 1
            documents.append(_document(image, answer, path, predictor))
            if not json:
                result(_line(image, answer))
    if json:
        json_result(documents)
    return 0 if answered == len(images) else 2


def _classify(predictor: Predictor, images: list[str], top_k: int) -> Iterator[tuple[str, Prediction | ImageError]]:
    """In the order given, in batches; an image that cannot be read does not stop the others."""
    for start in range(0, len(images), _BATCH):
        chunk = images[start : start + _BATCH]
        read = [_read(image) for image in chunk]
        answers = iter(predictor.predict_batch([image for image in read if not isinstance(image, ImageError)], top_k))
        for name, image in zip(chunk, read, strict=True):
            yield name, image if isinstance(image, ImageError) else next(answers)


def _read(image: str) -> Any:
    try:
        return read_image(image)
    except ImageError as error:
        return error


def _introduce(predictor: Predictor, path: str) -> str:
    """What runs, on what, and what it was trained on: nobody should take drawings for photographs."""
    training = predictor.spec.training
    origin = f", trained on {training.data.name}, {training.accuracy_text} there" if training else ""
    return f"note: {path} ({predictor.spec.model}{origin}) by {predictor.backend} on {predictor.provider}"


def _line(image: str, answer: Prediction) -> str:
    return f"{image}: " + ", ".join(f"{candidate.label} {candidate.score:.4f}" for candidate in answer.top)


def _document(image: str, answer: Prediction, path: str, predictor: Predictor) -> dict[str, Any]:
    return {
        "image": image,
        "label": answer.label,
        "index": answer.index,
        "score": answer.score,
        "top": answer.top,
        "model": path,
        "backend": predictor.backend,
        "provider": predictor.provider,
    }
