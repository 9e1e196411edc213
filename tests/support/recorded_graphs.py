"""CUDA graphs on the CPU: a capture records operators and undoes their effects, and a replay runs them again.

As with CUDA, a replay reads and writes the same tensors as the capture, Python code does not run again, and an operator
that waits for a result makes the capture fail. So a test can compare a captured step with an eager one bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU: Final = torch.device("cpu")

_WAITING: Final = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
    )
)
"""Operators that wait for the device, because their result is on the host or its size depends on the data."""


class _Call(NamedTuple):
    """A recorded operator, with the tensors that receive its results."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]


class RecordedGraph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`.

    Attributes:
        replays: the number of replays.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replays = 0
        self._calls: list[_Call] = []
        self._created: dict[int, torch.UntypedStorage] = {}
        self._original: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if _waits(func._schema.name, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func._schema.name}")
        for storage in (tensor.untyped_storage() for tensor in given):  # not every schema tells what is written
            if storage._cdata not in self._created and storage._cdata not in self._original:
                self._original[storage._cdata] = (storage, storage.clone())
        output = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in _tensors(output) if tensor.untyped_storage()._cdata not in known]
        self._created |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in new}
        if new or any(argument.is_write for argument in func._schema.arguments):  # everything else is a view
            self._calls.append(_Call(func, args, kwargs, new))
        return output

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record the operators in the block, and undo their effects at its end."""
        random_state = torch.get_rng_state()
        try:
            with self:
                yield
        finally:
            for storage, original in self._original.values():
                storage.copy_(original)
            torch.set_rng_state(random_state)

    def replay(self) -> None:
        """Run the recorded operators."""
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for call in self._calls:
                results = _tensors(call.operator(*call.args, **call.kwargs))
                new = results if len(results) == len(call.results) else []
                for target, result in zip(call.results, new, strict=True):
                    target.copy_(result)


class _Stream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device: torch.device = _CPU) -> None:
        self.device = device

    def wait_stream(self, other: "_Stream") -> None:
        pass


class _DefaultGenerator:
    """Stands for the default generator of a GPU: that of the CPU."""

    def get_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def graphsafe_set_state(self, other: torch.Generator) -> None:
        torch.set_rng_state(other.get_state())


def use_recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Replace the CUDA graphs of PyTorch, and return the list of those that are created."""
    graphs: list[RecordedGraph] = []

    def create() -> RecordedGraph:
        graphs.append(RecordedGraph())
        return graphs[-1]

    @contextmanager
    def on_stream(_: _Stream) -> Iterator[None]:
        yield

    replacements = {
        "CUDAGraph": create,
        "graph": lambda graph, *_, **__: graph.capture(),
        "graph_pool_handle": lambda: (0, 1),
        "Stream": _Stream,
        "stream": on_stream,
        "current_stream": _Stream,
        "set_stream": lambda _: None,
        "default_generators": {None: _DefaultGenerator()},
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    return graphs


def _waits(name: str, args: tuple[Any, ...]) -> bool:
    masks = name.startswith("aten::index") and any(tensor.dtype == torch.bool for tensor in _tensors(args[1:2]))
    return name in _WAITING or masks


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
