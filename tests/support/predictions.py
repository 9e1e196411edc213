"""Predictions of images that can all be read."""

from collections.abc import Iterable

from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Prediction


def require_predictions(found: Iterable[Prediction | ImageError]) -> list[Prediction]:
    """Return the predictions, and fail if there is an error among them."""
    predictions: list[Prediction] = []
    for entry in found:
        assert isinstance(entry, Prediction), entry
        predictions.append(entry)
    return predictions
