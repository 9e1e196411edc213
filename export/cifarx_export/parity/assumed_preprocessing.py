"""Test whether another preprocessing is better than the one that is assumed: then the assumption is likely wrong."""

import shlex
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_export.parity.chance import LEVEL
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, Reference
from cifarx_export.parity.paired_test import is_better
from cifarx_export.parity.predictions import best_classes
from cifarx_export.parity.scalings import SCALINGS, data_scaling, scaled
from cifarx_serve.backends.base import Backend
from cifarx_serve.errors import CheckFailed
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.progress import Progress
from cifarx_serve.spec import Color, InputSpec

_CHOICE_IMAGES: Final = 128
"""The number of images on which the most accurate candidate is chosen."""

_TEST_IMAGES: Final = 512
"""The number of other images on which it is compared with the assumed preprocessing."""

_MIN_IMAGES: Final = 20
"""With fewer images, no difference is significant."""

_FEWER_ERRORS: Final = 0.2
"""The share of the errors that have to disappear. A network that has learned little can be a bit more accurate with
other images than those that it was trained on: with more contrast, for example."""

_COLORS: Final[tuple[Color, ...]] = ("RGB", "BGR")


class _Candidate(NamedTuple):
    """An input with other values, and what differs from the assumed one."""

    input: InputSpec
    name: str


def require_no_better_preprocessing(backend: Backend, reference: Reference, name: str, progress: Progress) -> None:
    """Refuse an assumed preprocessing if the usual scalings and orders of the colors have a better one.

    The most accurate candidate on some images is compared with the assumed one on others, so that its choice does not
    favor it. The comparison is McNemar's exact test at the level of the test for chance. One that is significantly
    better, but has almost as many errors, is only noted. Nothing is tried if the preprocessing is stated, or if there
    are no labels, no colors, or too few images.

    Args:
        backend: runs the reference.
        reference: from `run_reference`.
        name: the file of the network, for messages.
        progress: called with a line before the candidates are tried, and for a note.

    Raises:
        CheckFailed: another preprocessing is better.
    """
    spec, images, labels = reference.spec, reference.data.images, reference.data.labels
    if "preprocessing" not in spec.assumed or labels is None or spec.input.channels != 3 or len(images) < _MIN_IMAGES:
        return
    progress("reference: comparing other preprocessings, because this one is assumed")
    order = np.random.default_rng(0).permutation(len(images))
    choice, test = np.split(order[: _CHOICE_IMAGES + _TEST_IMAGES], [min(_CHOICE_IMAGES, len(order) // 2)])
    chosen, chosen_labels = images[choice], labels[choice]
    candidates = _candidates(spec.input, images)
    best = max(candidates, key=lambda one: int((_predict(backend, chosen, one.input) == chosen_labels).sum()))
    before = best_classes(reference.logits[test], spec) == labels[test]
    after = _predict(backend, images[test], best.input) == labels[test]
    if not is_better(after, before, LEVEL):
        return
    problem = f"accuracy {before.mean():.1%} with the assumed preprocessing, but {after.mean():.1%} with {best.name}"
    if (~after).sum() > (1 - _FEWER_ERRORS) * (~before).sum():
        progress(f"note: {problem}")
    else:
        raise CheckFailed(
            problem,
            "preprocessing is likely wrong: state it with --preprocessing, or --mean and --std, find it with `cifarx "
            f"diagnose {shlex.quote(name)}` and labeled images, or allow it with --allow-chance-accuracy",
        )


def _candidates(size: InputSpec, images: NDArray[np.uint8]) -> list[_Candidate]:
    """Return an input for each usual scaling and order of the colors but the assumed ones."""
    scalings = (*SCALINGS, data_scaling(images[:_CHOICE_IMAGES]))
    named = {
        scaled(size, scaling, color): f"{scaling.name}{'' if color == size.color else f' and {color} images'}"
        for scaling in scalings
        for color in _COLORS
    }
    return [_Candidate(one, name) for one, name in named.items() if one != size]


def _predict(backend: Backend, images: NDArray[np.uint8], size: InputSpec) -> NDArray[np.int64]:
    starts = range(0, len(images), EVAL_BATCH_SIZE)
    outputs = [backend.run(normalize(images[start : start + EVAL_BATCH_SIZE], size)) for start in starts]
    return best_classes(np.concatenate(outputs), backend.spec)
