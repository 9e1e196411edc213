"""The base of what observes every operation of a running network, with the name of the module that it belongs to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class LayerDispatchMode(TorchDispatchMode):
    """Calls `observe` for every operation of a network, which runs in `following`."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules: list[str] = []

    @contextmanager
    def following(self, network: nn.Module) -> Iterator[None]:
        """Observe the network in a `with` block, and follow which of its modules is running."""
        handles = []
        for name, module in network.named_modules():

            def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
                self._modules.append(name)

            def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
                self._modules.pop()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and return its result."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return self.observe(func, args, kwargs or {})

    def layer(self, operator: str) -> str:
        """Return the name of the running module, with the name of an operator of PyTorch."""
        module = self._modules[-1] if self._modules else ""
        shown = operator.removeprefix("aten::").strip("_")
        return f"{module} ({shown})" if module else shown


def operator_name(func: Any) -> str:
    """Return the name of an operator, such as `aten::add`, without its overload."""
    return str(getattr(func, "_schema", func)).partition("(")[0].partition(".")[0]


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors that an operation returned."""
    if isinstance(result, Tensor):
        return [result]
    return [entry for entry in result if isinstance(entry, Tensor)] if isinstance(result, tuple | list) else []
