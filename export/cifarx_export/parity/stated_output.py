"""Check that a network returns what its spec says, logits or probabilities, on real images."""

from typing import Final

import numpy as np

from cifarx_export.parity.compare import Reference
from cifarx_serve.errors import CheckFailed

_TOLERANCE: Final = 1e-3
"""How far probabilities may be from 0, 1 and a sum of one: float16 rounds them."""


def require_stated_output(reference: Reference, name: str, *, is_stated: bool) -> None:
    """Check that probabilities are stated as such, and that what is stated as probabilities is.

    Args:
        reference: from `run_reference`.
        name: the file of the network, for messages.
        is_stated: whether somebody stated which of the two the network returns. Stated logits can be anything.

    Raises:
        CheckFailed: it is not so.
    """
    spec, outputs = reference.spec, reference.logits.astype(np.float64)
    within = bool(((outputs >= -_TOLERANCE) & (outputs <= 1 + _TOLERANCE)).all())
    sums = within and bool((np.abs(outputs.sum(axis=1) - 1) <= _TOLERANCE).all())
    are_probabilities = within if spec.activation == "sigmoid" else sums
    if spec.output == "logits" and not is_stated and are_probabilities:
        found = "between 0 and 1 and sum to 1" if sums else "between 0 and 1"
        raise CheckFailed(
            f"the outputs of {name} are {found}, as probabilities do",
            'state output = "probabilities", or "logits", in --spec FILE',
        )
    if spec.output == "probabilities" and not (sums or are_probabilities):
        raise CheckFailed(
            f"the outputs of {name} are from {outputs.min():.3g} to {outputs.max():.3g} and do not sum to 1, as "
            "probabilities do",
            'state output = "logits" in --spec FILE',
        )
