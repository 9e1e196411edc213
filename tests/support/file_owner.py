"""Files of other users, for tests that do not run as root."""

import os
from pathlib import Path

import pytest


def pretend_other_owner(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let a file or directory belong to another user until the end of the test."""
    own = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        state = own(self)
        if self != path:
            return state
        fields = list(state)
        fields[4] += 1  # st_uid
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", lstat)
