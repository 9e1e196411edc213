"""The JSON that the server's own API returns."""

import msgspec

from cifarx_serve.predictor import Candidate
from cifarx_serve.server.inference.model import ModelInfo


class ImagePrediction(msgspec.Struct, frozen=True, omit_defaults=True):
    """The prediction for one image: its label and the best classes. If the image cannot be read, `error` says why.

    For a model with several labels per image, `labels` are those that apply, best first; other models have no `labels`.
    """

    image: str | None
    label: str | None = None
    index: int | None = None
    score: float | None = None
    top: tuple[Candidate, ...] = ()
    labels: tuple[Candidate, ...] | None = None
    error: str | None = None


class Timing(msgspec.Struct, frozen=True):
    """How long a request took, in microseconds. `total` is the time from the request's head to its response."""

    decode: int
    queue: int
    compute: int
    total: int


class PredictResponse(msgspec.Struct, frozen=True):
    """Predictions in the order of the images."""

    model: str
    version: str
    predictions: list[ImagePrediction]
    timing_us: Timing


class KServePredictResponse(msgspec.Struct, frozen=True):
    """Predictions in the order of the images, as KServe's v1 protocol has them."""

    predictions: list[ImagePrediction]


class ModelsResponse(msgspec.Struct, frozen=True):
    """The served models, in the order of the command line."""

    models: list[ModelInfo]


class StatusResponse(msgspec.Struct, frozen=True):
    """The status of the process: `alive`, or `starting`, `ready`, `overloaded`, `draining` or `failed`."""

    status: str
