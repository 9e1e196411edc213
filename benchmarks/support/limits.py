"""Limits on measured figures: enforced on a quiet machine, only reported on a shared one."""


class LimitMissed(AssertionError):
    """A measured figure is outside its limit. Conditions that must hold on every machine use `assert`."""


def require(holds: bool, missed: str) -> None:
    """Raise LimitMissed with the text `missed` unless the limit holds."""
    if not holds:
        raise LimitMissed(missed)
