"""Build a whole model of a file again, from classes that are known and from what the file says about each module.

A file of `torch.save(model, …)` contains the attributes of every module: strides, padding, eps, activations, options.
All of them are used, so the network is the author's own, not a similar one. An object is made by `cls.__new__` and
gets plain, checked attributes. The classes are those of `torch.nn` and torchvision, and those of the code that the user
names. Nothing in a file is imported or called, and what cannot be taken over is refused, or fails when it is used.
"""

import argparse
import functools
import inspect
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import torch
from torch import nn

from cifarx_serve.errors import ModelFileError
from cifarx_train.checkpoints.external.module_stub import (
    MAX_DEPTH,
    as_plain_dict,
    attributes,
    is_module,
    named_items,
    nested_error,
    unwrap,
)
from cifarx_train.checkpoints.external.pickle_machine import Global, ObjectStub
from cifarx_train.checkpoints.external.pruning import fold_masks
from cifarx_train.checkpoints.external.torch_file import as_dtype
from cifarx_train.checkpoints.external.weight_sets import require_dense

FindClass: TypeAlias = Callable[[str], type[Any] | None]
"""Returns the class with a fully qualified name in a file, or None if it is not known."""

_LIBRARY: Final = re.compile(r"torch\.nn\.modules|torchvision\.(models|ops)")
_FUNCTION: Final = re.compile(r"torch\.(?:(?:nn\.functional|_C\._nn)\.)?(\w+)")
# Functions without side effects that a network may store as an attribute, such as its activation.
_FUNCTIONS: Final = frozenset(
    {"celu", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "identity", "leaky_relu"}
    | {"log_softmax", "logsigmoid", "mish", "normalize", "relu", "relu6", "selu", "sigmoid", "silu", "sin", "softmax"}
    | {"softmin", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "adaptive_avg_pool2d", "avg_pool2d"}
    | {"cos", "exp", "flatten", "layer_norm", "square", "sqrt"}
)
_NAMESPACES: Final[Mapping[str, type[Any]]] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
}
_NUMPY_SCALAR: Final = re.compile(r"numpy\._?core\.multiarray\.scalar")
_PRUNING_HOOK: Final = re.compile(r"torch\.nn\.utils\.prune\.\w+")
_HOOKS: Final = re.compile(r"_(?!is_)\w+_hooks?(_with_kwargs|_always_called)?|_compiled_call_impl")
_PARTS: Final = ("_parameters", "_buffers", "_modules")

_REMEDY: Final = "save its state_dict() instead, and name the network with --model"


def rebuild_module(path: Path, root: ObjectStub, find_class: FindClass) -> nn.Module:
    """Return a module of a file, on the CPU, in eval mode and in float32.

    Args:
        path: the file, for messages.
        root: the module in the file.
        find_class: returns the classes of its modules.

    Raises:
        ModelFileError: a class is not known, or an attribute of a module is not plain or would replace a method.
    """
    module = _Rebuilder(path, find_class).module(unwrap(root), 0)
    return module.requires_grad_(False).float().eval()


@cache
def library_classes() -> Mapping[str, type[nn.Module]]:
    """Return the modules of `torch.nn` and torchvision by their fully qualified names."""
    import torchvision  # noqa: F401  defines some of them

    pending: list[type[nn.Module]] = [nn.Module]
    found = {}
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        # Modules that contain code of their own are no layers.
        if _LIBRARY.match(kind.__module__) and not issubclass(kind, torch.fx.GraphModule | torch.jit.ScriptModule):
            found[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return found


class UnavailableObject:
    """Takes the place of an attribute that cannot be taken from a file. Whatever a network does with it fails."""

    __slots__ = ("_description",)

    def __init__(self, description: str) -> None:
        object.__setattr__(self, "_description", description)

    def _fail(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelFileError(f"{self._description}, which cannot be taken from the file", _REMEDY)

    def __getattr__(self, name: str) -> NoReturn:
        # Copying and inspecting a module asks each of its attributes for special methods.
        if name.startswith("__"):
            raise AttributeError(name)
        self._fail()

    def __deepcopy__(self, _memo: object) -> "UnavailableObject":
        return self

    __bool__ = __call__ = __iter__ = __len__ = __getitem__ = __contains__ = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _fail
    __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __index__ = _fail


class _Rebuilder:
    """Builds the objects of one file. An object that several others refer to is built once."""

    def __init__(self, path: Path, find_class: FindClass) -> None:
        self._path = path
        self._find_class = find_class
        self._built: dict[int, Any] = {}
        self._open: set[int] = set()

    def module(self, stub: ObjectStub, depth: int) -> nn.Module:
        """Return a module, with everything in it."""
        if id(stub) in self._open or depth > MAX_DEPTH:
            raise nested_error(self._path)
        if id(stub) not in self._built:
            kind = self._find_class(stub.name)
            if kind is None:
                raise self._unknown_class(stub.name)
            if not issubclass(kind, nn.Module) or stub.arguments or stub.called:
                raise self._error(f"contains a {_short(stub.name)} that is not a plain module")
            made: nn.Module = kind.__new__(kind)
            self._built[id(stub)] = made  # an attribute may refer to the module that contains it
            self._open.add(id(stub))
            self._fill(made, stub, depth)
            self._open.discard(id(stub))
        module: nn.Module = self._built[id(stub)]
        return module

    def _fill(self, module: nn.Module, stub: ObjectStub, depth: int) -> None:
        """Set the attributes of a new module."""
        kind, state = type(module), as_plain_dict(stub.state) or {}
        nn.Module.__init__(module)
        pruned = self._check_hooks(kind, state)
        content: dict[str, Any] = {**vars(module), **self._tensors(state)}
        content["_non_persistent_buffers_set"] = {
            name for name in state.get("_non_persistent_buffers_set") or () if name in content["_buffers"]
        }
        content["_modules"] = {
            name: None if child is None else self._child(child, f"{_short(stub.name)}.{name}", depth)
            for name, child in named_items(self._path, state.get("_modules"))
        }
        for name in [name for part in _PARTS for name in content[part]]:
            self._require_new_name(kind, name)
        for name, value in state.items():
            if name not in content and name not in pruned and not _is_hook(name):
                self._require_new_name(kind, name)
                content[name] = self._value(value, f"{_short(stub.name)}.{name}", depth)
        # The class may add attributes that older versions did not have.
        module.__setstate__(content)

    def _child(self, child: Any, owner: str, depth: int) -> nn.Module:
        if not is_module(child):
            raise self._error(f"contains {owner}, which is not a module")
        return self.module(unwrap(child), depth + 1)

    def _check_hooks(self, kind: type[nn.Module], state: dict[Any, Any]) -> set[str]:
        """Refuse hooks, except for those that multiply pruned tensors by their masks, and return their names."""
        pruned = set()
        for name, hooks in state.items():
            if not _is_hook(name) or not hooks:
                continue
            for hook in (as_plain_dict(hooks) or {None: hooks}).values():
                target = attributes(hook).get("_tensor_name")
                is_mask = isinstance(hook, ObjectStub) and _PRUNING_HOOK.fullmatch(hook.name)
                if name != "_forward_pre_hooks" or not is_mask or type(target) is not str:
                    raise self._error(f"contains a hook of {kind.__name__} ({name})")
                pruned.add(target)
        return pruned

    def _tensors(self, state: dict[Any, Any]) -> dict[str, dict[str, Any]]:
        """Return the parameters and buffers of a module. Pruned ones are multiplied by their masks."""
        parameters = dict(named_items(self._path, state.get("_parameters")))
        buffers = dict(named_items(self._path, state.get("_buffers")))
        for name, value in parameters.items():
            if value is not None and id(value) not in self._built:  # modules can share a parameter
                self._built[id(value)] = nn.Parameter(self._tensor(value, name), requires_grad=False)
            parameters[name] = None if value is None else self._built[id(value)]
        for name, value in buffers.items():
            buffers[name] = None if value is None else self._tensor(value, name)
        present = {name: value for name, value in {**parameters, **buffers}.items() if value is not None}
        folded = fold_masks(present).tensors
        products = {name: nn.Parameter(tensor, False) for name, tensor in folded.items() if name not in present}
        kept = {*folded, *(name for name, value in {**parameters, **buffers}.items() if value is None)}
        return {
            "_parameters": {**_only(parameters, kept), **products},
            "_buffers": _only(buffers, kept),
        }

    def _tensor(self, value: Any, name: str) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise self._error(f"contains {name!r}, which is not a dense tensor of real numbers")
        tensor = require_dense(self._path, name, value)
        return tensor.float() if tensor.is_floating_point() else tensor

    def _require_new_name(self, kind: type[Any], name: Any) -> None:
        """Check that setting an attribute does not replace a method or property of the class."""
        if type(name) is not str or not name.isprintable() or name.startswith("__"):
            raise self._error(f"contains an attribute of {kind.__name__} with an invalid name")
        if hasattr(type(inspect.getattr_static(kind, name, None)), "__get__"):
            raise self._error(f"replaces {kind.__name__}.{name}, a method of the class")

    # --- attributes

    def _value(self, value: Any, owner: str, depth: int) -> Any:
        """Return the value of an attribute: plain data, a tensor, a module, a known class or function."""
        if depth > MAX_DEPTH:
            raise nested_error(self._path)
        if value is None or type(value) in (bool, int, float, complex, str, bytes, torch.Size, torch.device):
            return value
        if isinstance(value, torch.Tensor) and id(value) not in self._built:
            self._built[id(value)] = self._tensor(value, owner)
        if isinstance(value, Global):
            known = self._global(value)
            return self._unavailable(owner, value.name) if known is None else known
        if id(value) not in self._built:
            self._built[id(value)] = (
                self._object(value, owner, depth)
                if isinstance(value, ObjectStub)
                else self._container(value, owner, depth)
            )
        return self._built[id(value)]

    def _container(self, value: Any, owner: str, depth: int) -> Any:
        items = functools.partial(self._value, owner=owner, depth=depth + 1)
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(items(item) for item in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((items(key), items(item)) for key, item in value.items())
        raise self._error(f"contains {owner}, a {type(value).__name__}")

    def _object(self, stub: ObjectStub, owner: str, depth: int) -> Any:
        if is_module(stub):
            return self.module(stub, depth + 1)
        if stub.name == "functools.partial":
            return self._partial(stub, owner, depth)
        if _NUMPY_SCALAR.fullmatch(stub.name) and (number := _numpy_scalar(stub)) is not None:
            return number
        made = self._instance(stub, owner, depth)
        return self._unavailable(owner, stub.name) if made is None else made

    def _instance(self, stub: ObjectStub, owner: str, depth: int) -> Any:
        """Return an object of a known class: a member of an enumeration, or one with plain attributes; else None."""
        namespace = _NAMESPACES.get(stub.name)
        kind = namespace or self._find_class(stub.name)
        if kind is not None and issubclass(kind, Enum):
            return _enum_member(kind, stub)
        state = as_plain_dict(stub.state if stub.state is not None else {})
        if kind is None or issubclass(kind, nn.Module) or state is None or _has_items(stub):
            return None
        if stub.called and namespace is None:  # by a function, or by a class with a constructor
            return None
        made: Any = namespace() if namespace else object.__new__(kind)
        self._built[id(stub)] = made
        for name, value in state.items():
            self._require_new_name(kind, name)
            vars(made)[name] = self._value(value, f"{owner}.{name}", depth + 1)
        return made

    def _partial(self, stub: ObjectStub, owner: str, depth: int) -> Any:
        match stub.state:
            case (Global() as function, tuple() as arguments, dict() as keywords, _) if known := self._global(function):
                positional = [self._value(item, owner, depth + 1) for item in arguments]
                named = {str(name): self._value(item, owner, depth + 1) for name, item in keywords.items()}
                return functools.partial(known, *positional, **named)
        return self._unavailable(owner, stub.name)

    def _global(self, value: Global) -> Any:
        """Return a dtype, a known class or a function without side effects, or None."""
        if dtype := as_dtype(value):
            return dtype
        if (function := _FUNCTION.fullmatch(value.name)) and function[1] in _FUNCTIONS:
            return getattr(nn.functional, function[1], None) or getattr(torch, function[1], None)
        return self._find_class(value.name)

    def _unavailable(self, owner: str, name: str) -> UnavailableObject:
        return UnavailableObject(f"the network in {self._path} uses {owner}, a {name}")

    # --- errors

    def _unknown_class(self, name: str) -> ModelFileError:
        root = name.partition(".")[0]
        if root in ("torch", "torchvision"):
            return ModelFileError(
                f"{self._path} needs the class {name}, which is not a layer or network of the installed {root}", _REMEDY
            )
        remedy = "name the code that defines it with --model FILE.py:CALLABLE, or save its state_dict() instead"
        return ModelFileError(
            f"{self._path} needs the class {name}, which does not belong to torch.nn or torchvision", remedy
        )

    def _error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self._path} {problem}", _REMEDY)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _is_hook(name: Any) -> bool:
    return type(name) is str and _HOOKS.fullmatch(name) is not None


def _only(tensors: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name in names}


def _has_items(stub: ObjectStub) -> bool:
    return bool(stub.arguments or stub.keywords or stub.items or stub.mapping)


def _enum_member(kind: type[Enum], stub: ObjectStub) -> Enum | None:
    """Return the member with the value in a file, such as timm's `Format.NCHW`. The constructor is not called."""
    match stub.arguments:
        case (bool() | int() | float() | str() as value,):
            return next(
                (member for member in kind if type(member.value) is type(value) and member.value == value), None
            )
    return None


def _numpy_scalar(stub: ObjectStub) -> Any:
    """Return the number in a NumPy scalar, which networks get from functions such as `numpy.linspace`."""
    match stub.arguments:
        case (ObjectStub(name="numpy.dtype", arguments=(str() as code, *_)), bytes() as data):
            import numpy as np

            if re.fullmatch(r"[biuf][1248]", code) and np.dtype(code).itemsize == len(data):
                return np.frombuffer(data, code)[0].item()
    return None
