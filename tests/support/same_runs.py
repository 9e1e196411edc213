"""Whether two runs left the same behind, to the bit."""

from pathlib import Path
from typing import Any

import torch

from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint


def same(one: Any, other: Any) -> bool:
    """Whether two nests of plain types hold the same, tensors to the bit."""
    match one:
        case torch.Tensor():
            return isinstance(other, torch.Tensor) and torch.equal(one, other)
        case dict():
            return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def require_same(one: Checkpoint, other: Checkpoint) -> None:
    """Weights, average, optimizer, random states and record are equal; the seconds it took need not be."""
    assert one.spec == other.spec
    assert same(one.model, other.model)
    assert same({**one.training, "seconds": 0}, {**other.training, "seconds": 0})


def require_same_run(out: Path, whole: Path) -> None:
    """Both folders hold the same checkpoints."""
    names = sorted(path.name for path in whole.glob("*.pth"))
    assert sorted(path.name for path in out.glob("*.pth")) == names
    for name in names:
        require_same(load_checkpoint(out / name), load_checkpoint(whole / name))
