"""What the server's own interface answers, as JSON."""

import msgspec

from cifarx_serve.predictor import Candidate
from cifarx_serve.server.inference.model import ModelRecord


class ImageAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image: its label and the best classes, or what was wrong with it."""

    image: str | None
    label: str | None = None
    index: int | None = None
    score: float | None = None
    top: tuple[Candidate, ...] = ()
    error: str | None = None


class Timing(msgspec.Struct, frozen=True):
    """Where a request's time went, in microseconds; `total` is from its head to its answer."""

    decode: int
    queue: int
    compute: int
    total: int


class PredictAnswer(msgspec.Struct, frozen=True):
    """Predictions in the order of the images."""

    model: str
    version: str
    predictions: list[ImageAnswer]
    timing_us: Timing


class ModelsAnswer(msgspec.Struct, frozen=True):
    """The models served, in the order of the files."""

    models: list[ModelRecord]


class ErrorAnswer(msgspec.Struct, frozen=True):
    """What was wrong, and how to mend it."""

    error: str


class StateAnswer(msgspec.Struct, frozen=True):
    """`alive`, or of a worker's models: starting, ready, draining or failed."""

    status: str
