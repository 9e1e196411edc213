"""Find networks that return something else each time they run: no file could agree with them."""

import traceback
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifarx_export.formats.conversion_errors import code_line, reporting_run_errors
from cifarx_serve.errors import UsageError

_TOLERANCE: Final = 1e-4
"""Relative difference of two runs that rounding alone does not reach."""


def require_deterministic(module: nn.Module, images: Tensor) -> None:
    """Run a network twice on the same images, and check that it returns the same.

    Args:
        module: the network, in eval mode on the CPU.
        images: a batch as the network takes it.

    Raises:
        UsageError: the results differ or are not one tensor, or the network raises an exception. The message names the
            line of the code, or the buffer that the network changes.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    first, second = _run(module, images, seed=0), _run(module, images, seed=1)
    scale = first.abs().nan_to_num(0).max().item()
    if torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True):
        return
    changed = [name for name, buffer in module.named_buffers() if not torch.equal(buffer, buffers[name])]
    with _RandomOperations() as recorder:
        _run(module, images, seed=2)
    if recorder.place is not None:
        raise UsageError(
            f"{recorder.place} draws random numbers in eval mode, so the network never returns the same twice",
            "draw them only in training mode, as in dropout(x, training=self.training)",
        )
    reason = f", because it changes its buffer {changed[0]}" if changed else ""
    raise UsageError(
        f"the network returns something else when it runs a second time on the same images{reason}",
        "let forward() depend on nothing but the images in eval mode",
    )


def _run(module: nn.Module, images: Tensor, seed: int) -> Tensor:
    with reporting_run_errors(images), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = module(images.clone())
    if not isinstance(outputs, Tensor):
        raise UsageError(
            f"the network returns a {type(outputs).__name__} instead of one tensor",
            "return the logits alone in eval mode",
        )
    return outputs


class _RandomOperations(TorchDispatchMode):
    """Remembers where the first operation that draws random numbers was called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if self.place is None and torch.Tag.nondeterministic_seeded in func.tags:
            frames = traceback.extract_stack()
            self.place = code_line((frame.filename, frame.lineno or 0) for frame in frames) or "the network"
        return func(*args, **(kwargs or {}))
