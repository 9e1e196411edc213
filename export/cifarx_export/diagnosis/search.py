"""Try many preprocessings of one network on few images, and the best of them on all images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.diagnosis.candidates import geometries, geometry, refinements
from cifarx_export.diagnosis.class_order import ClassOrder, OrderName, best_order
from cifarx_export.diagnosis.pictures import Pictures
from cifarx_export.diagnosis.ranking import find_ties
from cifarx_export.parity.predictions import best_classes
from cifarx_export.parity.scalings import SCALINGS, Scaling, data_scaling, scaled
from cifarx_serve.backends.base import Backend
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.progress import Progress
from cifarx_serve.spec import Color, InputSpec

_RUNGS: Final = (64, 192, 576)
"""The number of images after which only the best third of the candidates goes on: successive halving (Jamieson and
Talwalkar, 2016, arXiv:1502.07943)."""

MIN_IMAGES: Final = _RUNGS[0]
"""The smallest number of images that tells preprocessings apart."""

_KEPT: Final = 1 / 3
_MIN_KEPT: Final = 6
_REFINED: Final = 2
"""Number of candidates whose filters and crops are varied too."""

_SEARCHED: Final = 0.6
"""The largest share of the images on which candidates are left out. The others are a fair test of those that remain."""

_BATCH_SIZE: Final = 64


class Rung(msgspec.Struct, frozen=True):
    """How many ways to preprocess images were tried on how many images."""

    candidates: int
    images: int


@dataclass(eq=False)
class Candidate:
    """A preprocessing, and the predictions with it for the first images."""

    input: InputSpec
    stated: bool = False
    predictions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


class Finalist(NamedTuple):
    candidate: Candidate
    order: ClassOrder


class Search:
    """Successive halving over the candidates of one network.

    Args:
        backend: runs the network.
        pictures: the images.
        orders: orders of the classes to try.
        progress: called with a line about each step.

    Attributes:
        spec: the spec of the network.
        labels: the labels of the images, (N,).
        rungs: what was tried so far.
        searched: the number of images, the first ones, on which candidates were left out.
        scalings: the scalings that are tried.
    """

    def __init__(
        self,
        backend: Backend,
        pictures: Pictures,
        orders: dict[OrderName, NDArray[np.int64]],
        progress: Progress,
    ) -> None:
        self._backend = backend
        self._pictures = pictures
        self._orders = orders
        self._progress = progress
        self.spec = backend.spec
        self.labels = pictures.labels
        self.rungs: list[Rung] = []
        self.searched = 0
        self._geometries: dict[bytes, InputSpec] = {}
        plain = msgspec.structs.replace(geometry(backend.spec.input), height=64, width=64)
        self.scalings: Sequence[Scaling] = SCALINGS
        if plain.channels == 3:
            sample = pictures.pixels(plain, 0, min(len(pictures), MIN_IMAGES))
            self.scalings = (*SCALINGS, data_scaling(sample))

    def run(self, sizes: Sequence[tuple[int, int]]) -> list[Finalist]:
        """Return the candidates that were tried on all images, the most accurate first."""
        candidates = self._usual(sizes)
        counts = [count for count in _RUNGS if count <= _SEARCHED * len(self._pictures)]
        for number, count in enumerate(counts):
            candidates = self._best(candidates, count)
            if number == min(1, len(counts) - 1):
                candidates = self._best([*candidates, *self._refined(candidates)], count)
            self.searched = count
        return self._ranked(self._evaluated(candidates, len(self._pictures)))

    def ties(self, finalists: Sequence[Finalist]) -> list[bool]:
        """Return which finalists the first one is not better than, on the images that had no part in the search."""
        return find_ties([finalist.order.correct[self.searched :] for finalist in finalists])

    def _usual(self, sizes: Sequence[tuple[int, int]]) -> list[Candidate]:
        """Return a candidate for the stated input, and one for each combination of usual ones."""
        spec = self._backend.spec.input
        colors: tuple[Color, ...] = ("L",) if spec.channels == 1 else ("RGB", "BGR")
        inputs = [
            scaled(shape, scaling, color)
            for height, width in sizes
            for shape in geometries(msgspec.structs.replace(spec, height=height, width=width, resize_to=None))
            for scaling in self.scalings
            for color in colors
        ]
        return [Candidate(spec, stated=True), *(Candidate(one) for one in dict.fromkeys(inputs) if one != spec)]

    def _refined(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        known = {candidate.input for candidate in candidates}
        variants = (variant for candidate in candidates[:_REFINED] for variant in refinements(candidate.input))
        return [Candidate(variant) for variant in dict.fromkeys(variants) if variant not in known]

    def _best(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """Try candidates on the first images, and return the best third of them and the stated one."""
        ranked = [finalist.candidate for finalist in self._ranked(self._evaluated(candidates, count))]
        kept = max(_MIN_KEPT, round(len(ranked) * _KEPT))
        return [*ranked[:kept], *(candidate for candidate in ranked[kept:] if candidate.stated)]

    def _evaluated(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """Predict the first images with each candidate, and return the candidates.

        Those with the same geometry share the resized images. A geometry whose pixels are those of an earlier one is
        left out: on square images, a letterbox is the same as a stretch.
        """
        groups: dict[tuple[InputSpec, int], list[Candidate]] = {}
        for candidate in candidates:
            groups.setdefault((geometry(candidate.input), len(candidate.predictions)), []).append(candidate)
        evaluated: list[Candidate] = []
        for (shape, start), members in groups.items():
            if start < count:
                pixels = self._pictures.pixels(shape, start, count)
                if start == 0 and self._geometries.setdefault(pixels[:MIN_IMAGES].tobytes(), shape) != shape:
                    continue
                for candidate in members:
                    new = self._predict(pixels, candidate.input)
                    candidate.predictions = np.concatenate([candidate.predictions, new])
            evaluated += members
        self._progress(f"tried {len(evaluated)} preprocessings on {count:,} images")
        self.rungs.append(Rung(len(evaluated), count))
        return evaluated

    def _predict(self, pixels: NDArray[np.uint8], size: InputSpec) -> NDArray[np.int64]:
        starts = range(0, len(pixels), _BATCH_SIZE)
        batches = (normalize(pixels[start : start + _BATCH_SIZE], size) for start in starts)
        return np.concatenate([best_classes(self._backend.run(batch), self._backend.spec) for batch in batches])

    def _ranked(self, candidates: Sequence[Candidate]) -> list[Finalist]:
        """Return the candidates with their best order of the classes, the most accurate first."""
        labels = self._pictures.labels
        finalists = [
            Finalist(one, best_order(one.predictions, labels[: len(one.predictions)], self._orders))
            for one in candidates
        ]
        return sorted(finalists, key=lambda finalist: -int(finalist.order.correct.sum()))
