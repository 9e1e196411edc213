"""What a proof has to hold to, by precision. Shown in every report; never loosened to let something pass."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from cifarx_serve.errors import UsageError, unknown


class Gate(NamedTuple):
    """Every logit within `atol + rtol * |reference|`, and at least `agreement` of the images the same argmax.

    A flip of the argmax is forgiven only where the reference's own margin is inside the tolerance.
    """

    atol: float
    rtol: float
    agreement: float


GATES: Final[Mapping[str, Gate]] = MappingProxyType({"fp32": Gate(atol=1e-4, rtol=1e-4, agreement=1.0)})


def gate(precision: str, atol: float | None = None, rtol: float | None = None) -> Gate:
    """The gate of a precision, with the tolerances given in place of its own.

    Raises:
        UsageError: a precision without a gate, or a tolerance that is negative or not a number.
    """
    if precision not in GATES:
        raise unknown("precision", precision, GATES)
    chosen = GATES[precision]
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name} is {value}", "give a number of 0 or more")
    return chosen._replace(
        atol=chosen.atol if atol is None else atol,
        rtol=chosen.rtol if rtol is None else rtol,
    )
