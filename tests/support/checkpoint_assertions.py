"""Assertions that checkpoints and training runs are bit-for-bit the same."""

from pathlib import Path
from typing import Any

import torch

from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint


def deep_equal(a: Any, b: Any) -> bool:
    """Return whether two nested structures of plain types and tensors are equal, tensors bit for bit."""
    match a:
        case torch.Tensor():
            return isinstance(b, torch.Tensor) and torch.equal(a, b)
        case dict():
            return a.keys() == b.keys() and all(deep_equal(value, b[key]) for key, value in a.items())
        case list() | tuple():
            return len(a) == len(b) and all(map(deep_equal, a, b))
    return bool(a == b)


def assert_same_checkpoint(a: Checkpoint, b: Checkpoint) -> None:
    """Assert that two checkpoints are equal, except for the elapsed seconds."""
    assert a.spec == b.spec
    assert deep_equal(a.weights, b.weights)
    assert deep_equal({**a.training, "seconds": 0}, {**b.training, "seconds": 0})


def assert_same_run(out: Path, expected: Path) -> None:
    """Assert that two folders contain the same checkpoints."""
    names = sorted(path.name for path in expected.glob("*.pth"))
    assert sorted(path.name for path in out.glob("*.pth")) == names
    for name in names:
        assert_same_checkpoint(load_checkpoint(out / name), load_checkpoint(expected / name))
