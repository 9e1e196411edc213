"""Look into a whole model in a file: its modules, its wrappers and its state dict. Nothing is built here."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeGuard

from cifarx_serve.errors import ModelFileError
from cifarx_train.checkpoints.external.pickle_machine import ObjectStub
from cifarx_train.checkpoints.external.torch_file import REMEDY

# Modules that contain another one and return what it returns.
_WRAPPERS: Final = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
_AVERAGED_MODEL: Final = "torch.optim.swa_utils.AveragedModel"
# Limits far beyond any network, because a file can contain modules that contain each other.
_MAX_MODULES: Final = 20_000
MAX_DEPTH: Final = 50
_MAX_NAME_LENGTH: Final = 500


def as_plain_dict(value: Any) -> dict[Any, Any] | None:
    """Return a dict in a file, or None for a value of any other type."""
    return dict(value) if type(value) in (dict, OrderedDict) else None


def attributes(value: Any) -> dict[Any, Any]:
    """Return the attributes or items of an object in a file that is similar to a dict, such as a `Namespace`."""
    if not isinstance(value, ObjectStub):
        return as_plain_dict(value) or {}
    return {**(as_plain_dict(value.state) or {}), **value.keywords, **value.mapping}


def is_module(value: Any) -> TypeGuard[ObjectStub]:
    """Return whether a value is a module: an object with the dicts in which `torch.nn.Module` stores its parts."""
    if not isinstance(value, ObjectStub):
        return False
    state = as_plain_dict(value.state) or {}
    return value.name in _WRAPPERS or ("_parameters" in state and "_modules" in state)


def is_averaged_model(stub: ObjectStub) -> bool:
    """Return whether a module contains the average of the weights of several training steps."""
    return stub.name == _AVERAGED_MODEL


def unwrap(stub: ObjectStub) -> ObjectStub:
    """Return the module inside the wrappers of parallel training, averaging and compilation."""
    for _ in range(MAX_DEPTH):
        if (key := _WRAPPERS.get(stub.name)) is None:
            break
        # A compiled module is saved as a call with the module as its argument.
        inner = stub.arguments[0] if stub.arguments else attributes(attributes(stub).get("_modules")).get(key)
        if not is_module(inner):
            break
        stub = inner
    return stub


def module_state_dict(path: Path, root: ObjectStub) -> Iterator[tuple[str, Any]]:
    """Yield the state dict of a module in order. The values are not checked and can be anything.

    Raises:
        ModelFileError: the modules contain each other, or a name is invalid.
    """
    pending: list[tuple[str, int, Any]] = [("", 0, root)]
    count = 0
    while pending:
        prefix, depth, module = pending.pop()
        count += 1
        if count > _MAX_MODULES or depth > MAX_DEPTH:
            raise nested_error(path)
        state = attributes(module)
        non_persistent = state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in named_items(path, state.get(kind)):
                if value is not None and not (type(non_persistent) is set and name in non_persistent):
                    yield f"{prefix}{name}", value
        children = [(f"{prefix}{name}.", depth + 1, child) for name, child in named_items(path, state.get("_modules"))]
        pending += reversed(children)


def named_items(path: Path, items: Any) -> list[tuple[str, Any]]:
    """Return the items of a dict of parameters, buffers or modules.

    Raises:
        ModelFileError: a name is invalid.
    """
    checked = list((as_plain_dict(items) or {}).items())
    for name, _ in checked:
        check_name(path, name)
    return checked


def check_name(path: Path, name: Any) -> None:
    """Raise a ModelFileError for a key that no state dict of PyTorch has."""
    if type(name) is not str or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise ModelFileError(f"{path} contains a weight with an invalid name", REMEDY)


def nested_error(path: Path) -> ModelFileError:
    """Return the error for modules that contain each other."""
    return ModelFileError(f"the modules in {path} contain each other", REMEDY)
