"""The tolerances of the parity check, by precision. Every report shows them; they are never loosened to pass."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.errors import UsageError, unknown_name_error


class Tolerance(NamedTuple):
    """How far an artifact may differ from its reference.

    Every logit must satisfy `|artifact - reference| <= atol + rtol * |reference|`, the formula of
    `torch.testing.assert_close`, and the argmax must agree on at least a share `agreement` of the images. A different
    argmax is forgiven only if the margin between the two classes in the reference is within the tolerance.
    Reduced precisions round every value, so they have no bound on the logits (both None), only on agreement and
    accuracy.

    Attributes:
        atol: absolute tolerance of a logit.
        rtol: tolerance of a logit relative to the reference logit.
        agreement: minimum share of images with the same argmax, 0 to 1.
        accuracy_drop: maximum loss of accuracy, as a fraction; None for no bound.
    """

    atol: float | None
    rtol: float | None
    agreement: float
    accuracy_drop: float | None = None

    @property
    def bounds_logits(self) -> bool:
        """Whether individual logits have a bound."""
        return self.atol is not None or self.rtol is not None

    def allowed_error(self, reference: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the largest allowed absolute error for each reference logit; infinity if logits have no bound."""
        if not self.bounds_logits:
            return np.full_like(reference, np.inf)
        return (self.atol or 0.0) + (self.rtol or 0.0) * np.abs(reference)


TOLERANCES: Final[Mapping[str, Tolerance]] = MappingProxyType(
    {
        "fp32": Tolerance(atol=1e-4, rtol=1e-4, agreement=1.0),
        "bf16": Tolerance(atol=None, rtol=None, agreement=0.995, accuracy_drop=0.005),
        "fp16": Tolerance(atol=None, rtol=None, agreement=0.999),
        "int8": Tolerance(atol=None, rtol=None, agreement=0.99, accuracy_drop=0.005),
    }
)
"""The default tolerance of each precision."""

PROBABILITY_ATOL: Final = 1e-5
"""The absolute tolerance of a probability in fp32: a tenth of that of a logit, because the derivative of softmax and
sigmoid, p(1 - p), makes errors smaller. The relative tolerance is the same."""


def get_tolerance(
    precision: str,
    atol: float | None = None,
    rtol: float | None = None,
    output: Literal["logits", "probabilities"] = "logits",
) -> Tolerance:
    """Return the tolerance of a precision, with `atol` and `rtol` replaced where they are given.

    Args:
        precision: one of `TOLERANCES`.
        atol, rtol: replacements, or None.
        output: whether the model returns `logits` or `probabilities`.

    Raises:
        UsageError: the precision is unknown, or `atol` or `rtol` is negative or not finite.
    """
    if precision not in TOLERANCES:
        raise unknown_name_error("precision", precision, TOLERANCES)
    default = TOLERANCES[precision]
    if output == "probabilities" and default.atol is not None:
        default = default._replace(atol=PROBABILITY_ATOL)
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name} is {value}", "give a number of 0 or more")
    return default._replace(
        atol=default.atol if atol is None else atol,
        rtol=default.rtol if rtol is None else rtol,
    )
