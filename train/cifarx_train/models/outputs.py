"""Reduce what a network returns to one tensor: many networks return a tuple, a dict or an object."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from cifarx_serve.errors import UsageError, error_message
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.user_code import user_code_line

OutputKey: TypeAlias = str | int
"""The key, attribute or position of a tensor in what a network returns."""

LOGITS: Final = "logits"
"""The key under which Hugging Face's networks, and torchvision's with auxiliary heads, return their logits."""

_BATCH: Final = 2
_OTHER_BATCHES: Final = (1, 4, 8, 10, 16, 32, 50, 64, 100, 128, 256)
"""The batch sizes that are tried for a network that does not run with two images: those that authors fix."""

_ANY_BATCH: Final = "flatten with x.flatten(1), or reshape with x.shape[0], instead of a fixed batch size"


class SingleOutput(nn.Module):
    """Returns one of the tensors that a network returns. Its state dict is that of the network.

    Args:
        network: the network.
        key: which of its outputs to return. A network that returns one tensor in training mode or in eval mode only
            is supported too.
    """

    def __init__(self, network: nn.Module, key: OutputKey) -> None:
        super().__init__()
        self.network = network
        self.key = key

    def forward(self, images: Tensor) -> Tensor:
        return select_output(self.network(images), self.key)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.network.load_state_dict(state_dict, strict, assign)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network in a `SingleOutput`, whose parameters have the names of its state dict."""
    return module.network if isinstance(module, SingleOutput) else module


def select_output(result: Any, key: OutputKey) -> Tensor:
    """Return one tensor of what a network returns, or the result itself if it is a tensor."""
    if isinstance(result, Tensor):
        return result
    selected: Tensor = getattr(result, key) if isinstance(key, str) and hasattr(result, key) else result[key]
    return selected


def require_outputs(module: nn.Module, outputs: int, size: InputSpec, source: ModelSource) -> nn.Module:
    """Return the module, wrapped in `SingleOutput` if it returns more than one tensor.

    Runs the module once in eval mode, on the CPU. Its state, its mode and the random generator are not changed.

    Args:
        module: the network, on the CPU.
        outputs: the number of values per image that it has to return.
        size: the input to run it with.
        source: what built it. Its `output`, if it is not None, selects the tensor.

    Raises:
        UsageError: the module does not run with this input, or does not return one tensor (N, outputs) of numbers.
    """
    result = _run(module, size, source)
    key = source.output
    if isinstance(result, Tensor):
        tensor, adapted = result, module
    else:
        key = _find_logits(result, outputs, source) if key is None else key
        tensor, adapted = _stated_output(result, key, source), SingleOutput(module, key)
    if tensor.shape != (_BATCH, outputs):
        shape = ", ".join(map(str, tensor.shape[1:]))
        if tensor.ndim == 2 and len(tensor) == _BATCH:
            raise outputs_error(source, tensor.shape[1], outputs)
        if tensor.ndim == 2:
            raise UsageError(
                f"{source.name} returns {len(tensor)} rows for {_BATCH} images of {'x'.join(map(str, size.shape))}",
                f"state the size of its images with --image-size, and {_ANY_BATCH}",
            )
        raise UsageError(f"{source.name} returns (N, {shape})", f"return one tensor (N, {outputs})")
    if not tensor.is_floating_point():
        raise UsageError(f"{source.name} returns {tensor.dtype}".replace("torch.", ""), "return logits as floats")
    return adapted


def with_one_output(module: nn.Module, outputs: int, size: InputSpec, source: ModelSource) -> nn.Module:
    """Return the module, wrapped in `SingleOutput` if it returns more than one tensor in training mode only.

    Networks with auxiliary heads do. For the arguments and errors see `require_outputs`.
    """
    if isinstance(module, SingleOutput):
        return module
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        result = deepcopy(module).train()(torch.zeros(_BATCH, *size.shape))
    return module if isinstance(result, Tensor) else SingleOutput(module, _find_logits(result, outputs, source))


def outputs_error(source: ModelSource, found: int, outputs: int) -> UsageError:
    """Return the error for a network whose number of outputs is not that of the classes."""
    return UsageError(
        f"{source.name} has {found} {'output' if found == 1 else 'outputs'}, not {outputs}",
        "give as many class names as it has outputs, or set its number of outputs with --model-arg",
    )


def count_outputs(module: nn.Module, size: InputSpec, source: ModelSource) -> int | None:
    """Return the number of values per image that a module returns. For the arguments see `require_outputs`.

    Returns:
        None if the module returns several tensors with different numbers, and it is not known which are the logits.

    Raises:
        UsageError: the module does not run with this input.
    """
    tensors = dict(_named_tensors(_run(module, size, source)))
    key = source.output if source.output is not None else LOGITS
    candidates = [tensors[key]] if key in tensors else list(tensors.values())
    numbers = {tensor.shape[1] for tensor in candidates if tensor.ndim == 2 and len(tensor) == _BATCH}
    return numbers.pop() if len(numbers) == 1 else None


def runs_with(module: nn.Module, size: InputSpec, batch: int = _BATCH) -> bool:
    """Return whether a module returns a row per image for a batch of inputs. The module is not changed.

    A module that reshapes to rows of a fixed length returns another number of rows for images of another size.
    """
    try:
        result = _forward(module, size, batch)
    except Exception:  # modules raise anything for an input of another shape
        return False
    rows = [len(tensor) for _, tensor in _named_tensors(result) if tensor.ndim]
    return not rows or batch in rows


def _run(module: nn.Module, size: InputSpec, source: ModelSource) -> Any:
    try:
        return _forward(module, size)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # see `runs_with`
        place = user_code_line(error)
        reason = f"{f'{place}: ' if place else ''}{error_message(error)}"
        fixed = next((batch for batch in _OTHER_BATCHES if runs_with(module, size, batch)), None)
        if fixed is not None:
            raise UsageError(f"{source.name} runs only with batches of {fixed} ({reason})", _ANY_BATCH) from error
        shape = "x".join(map(str, size.shape))
        raise UsageError(
            f"{source.name} does not run with {shape} images ({reason})",
            "state the size of its images with --image-size, and their channels with --color",
        ) from error


def _forward(module: nn.Module, size: InputSpec, batch: int = _BATCH) -> Any:
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return module.eval()(torch.zeros(batch, *size.shape))
    finally:
        for part, training in modes:
            part.training = training


def _find_logits(result: Any, outputs: int, source: ModelSource) -> OutputKey:
    tensors = dict(_named_tensors(result))
    if LOGITS in tensors:
        return LOGITS
    fitting = [key for key, tensor in tensors.items() if tensor.shape == (_BATCH, outputs)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise UsageError(
            f"{source.name} returns {_describe(result)}, of which none fits {outputs} classes",
            f"return one tensor (N, {outputs})",
        )
    raise UsageError(
        f"{source.name} returns {_describe(result)}, of which {len(fitting)} fit {outputs} classes",
        f"return the logits alone, or state which output they are, as in source.output = {fitting[0]!r} in --spec FILE",
    )


def _stated_output(result: Any, key: OutputKey, source: ModelSource) -> Tensor:
    tensor = dict(_named_tensors(result)).get(key)
    if tensor is None:
        raise UsageError(
            f"{source.name} returns no tensor {key!r} but {_describe(result)}", "correct source.output in --spec FILE"
        )
    return tensor


def _named_tensors(result: Any) -> Iterator[tuple[OutputKey, Tensor]]:
    """Yield the tensors that a network returned, with their keys."""
    items: Any
    if isinstance(result, Tensor):
        items = [(0, result)]
    elif isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, tuple | list):
        items = zip(getattr(result, "_fields", range(len(result))), result, strict=True)
    elif is_dataclass(result):
        items = [(field.name, getattr(result, field.name)) for field in fields(result)]
    else:
        items = vars(result).items() if hasattr(result, "__dict__") else []
    yield from ((key, value) for key, value in items if isinstance(value, Tensor))


def _describe(result: Any) -> str:
    """Return the type of a result and the shapes of its tensors, as `a dict (features (N, 8), logits (N, 10))`."""
    if isinstance(result, Tensor):
        return f"(N, {', '.join(map(str, result.shape[1:]))})"
    shapes = [f"{key} (N, {', '.join(map(str, tensor.shape[1:]))})" for key, tensor in _named_tensors(result)]
    return f"a {type(result).__name__} ({', '.join(shapes) or 'no tensors'})"
