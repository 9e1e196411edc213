"""What a proof has to hold to, by precision. Shown in every report; never loosened to let something pass."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import UsageError, unknown


class Tolerance(NamedTuple):
    """Every logit within `atol + rtol * |reference|`, and at least `agreement` of the images the same argmax.

    A flip of the argmax is forgiven only where the reference's own margin is inside the tolerance. Precisions that
    round every value have no tolerance (None): what they may cost is said in answers, and in accuracy.

    Attributes:
        atol: of a logit, absolute.
        rtol: of a logit, relative to the reference's.
        agreement: a share of the images.
        accuracy_drop: how much of the reference's accuracy may be lost, a fraction; None for no bound of its own.
    """

    atol: float | None
    rtol: float | None
    agreement: float
    accuracy_drop: float | None = None

    @property
    def has_tolerance(self) -> bool:
        return self.atol is not None or self.rtol is not None

    def allowed(self, expected: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tolerance at each reference value: infinite where the gate has none."""
        if not self.has_tolerance:
            return np.full_like(expected, np.inf)
        return (self.atol or 0.0) + (self.rtol or 0.0) * np.abs(expected)


TOLERANCES: Final[Mapping[str, Tolerance]] = MappingProxyType(
    {
        "fp32": Tolerance(atol=1e-4, rtol=1e-4, agreement=1.0),
        "fp16": Tolerance(atol=None, rtol=None, agreement=0.999),
        "int8": Tolerance(atol=None, rtol=None, agreement=0.99, accuracy_drop=0.005),
    }
)


def gate(precision: str, atol: float | None = None, rtol: float | None = None) -> Tolerance:
    """The gate of a precision, with the tolerances given in place of its own.

    Raises:
        UsageError: a precision without a gate, or a tolerance that is negative or not a number.
    """
    if precision not in TOLERANCES:
        raise unknown("precision", precision, TOLERANCES)
    chosen = TOLERANCES[precision]
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name} is {value}", "give a number of 0 or more")
    return chosen._replace(
        atol=chosen.atol if atol is None else atol,
        rtol=chosen.rtol if rtol is None else rtol,
    )
