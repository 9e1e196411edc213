"""Limits of speed: eval_model where a machine is one's own, told where others use it too."""


class LimitMissed(AssertionError):
    """A figure of time outside its limit; what is wrong, whatever the machine, is an assertion of its own."""


def require(held: bool, limit: str) -> None:
    """Raise where a limit does not hold.

    Raises:
        LimitMissed: with `limit`, the figure and what it should be.
    """
    if not held:
        raise LimitMissed(limit)
