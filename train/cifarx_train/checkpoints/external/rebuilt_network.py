"""Build the network of a whole model in a file, from the classes that the user's options allow."""

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import nn

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.checkpoints.external.candidates import find_similar_network
from cifarx_train.checkpoints.external.key_matching import list_names
from cifarx_train.checkpoints.external.layer_settings import different_settings
from cifarx_train.checkpoints.external.pickle_machine import ObjectStub
from cifarx_train.checkpoints.external.stated_network import (
    ExternalNetwork,
    conversion_notes,
    stated_network,
)
from cifarx_train.checkpoints.external.weight_sets import WeightSet
from cifarx_train.checkpoints.external.whole_model import FindClass, library_classes, rebuild_module
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.lzh import Lzh
from cifarx_train.models.options import ModelOptions
from cifarx_train.models.outputs import count_outputs, runs_with
from cifarx_train.models.registry import is_registered
from cifarx_train.models.sources import HUGGING_FACE_PREFIX, TIMM_PREFIX
from cifarx_train.models.user_code import (
    is_reference,
    load_user_module,
    parse_reference,
    running_user_code,
    source_sha256,
)
from cifarx_train.models.user_networks import find_input

_LZH: Final = ("model.Lzh", "__main__.Lzh", "cifarx_train.models.lzh.Lzh")
"""The names of the Lzh class in the scripts of the training notes and in cifarx."""

_LIBRARIES: Final = {TIMM_PREFIX: "timm", HUGGING_FACE_PREFIX: "transformers"}
_NOT_USER_CODE: Final = sys.stdlib_module_names | {"numpy", "torch", "torchvision"}


def rebuilt_network(path: Path, weights: WeightSet, stub: ObjectStub, options: ModelOptions) -> ExternalNetwork:
    """Return the network of a whole model.

    Where `options.model` names the user's code, the classes of that code are known too. Where it names a network, the
    one in the file must be the same. If its own class is not known, only its layers can be compared.

    Args:
        path: the file.
        weights: the weights, which are a whole model.
        stub: the model without wrappers.
        options: what the user states.

    Raises:
        UsageError: the model does not run, or is not the network that is stated.
        ModelFileError: a class is not known, or an attribute cannot be taken over.
    """
    find_class = _class_finder(options)
    if stub.name in _LZH and not _names_code(options):
        module = _lzh(path, stub, find_class)
    elif _states_name(options) and (find_class(stub.name) is None or not is_registered(str(options.model))):
        network = stated_network(path, weights, options)
        _require_same_settings(path, stub, network, find_class)
        return network
    else:
        with _running_code(options):
            module = rebuild_module(path, stub, find_class)
    network = _module_network(path, module, options)
    return network._replace(notes=conversion_notes(weights.tensors(path)))


def _names_code(options: ModelOptions) -> bool:
    return options.model is not None and is_reference(options.model)


def _states_name(options: ModelOptions) -> bool:
    return options.model is not None and not is_reference(options.model)


def _running_code(options: ModelOptions) -> AbstractContextManager[None]:
    return running_user_code(parse_reference(str(options.model))) if _names_code(options) else nullcontext()


def _module_network(path: Path, module: nn.Module, options: ModelOptions) -> ExternalNetwork:
    """Return the network of a module that was built from a file. The name is that of the registry, if it is the same.

    Raises:
        UsageError: the module does not run, or is not the network that is stated.
    """
    code = str(options.model) if _names_code(options) else None
    sha256 = source_sha256(code) if code else None
    source = ModelSource(kind="checkpoint", name=path.name, sha256=sha256, output=options.overrides.output)
    states_input = "input" in options.overrides.fields
    usual = None if states_input else find_input(module)
    size = options.overrides.apply_to_input(usual or InputSpec(height=32, width=32))
    outputs = count_outputs(module, size, source) or len(options.overrides.fields.get("class_names", ()))
    if not outputs:
        raise UsageError(
            f"{path} contains a model that returns several tensors",
            "state the class names with --classes, or its output in --spec",
        )
    name = re.sub(r"\W", "_", type(module).__name__.lower())
    similar = find_similar_network(module, outputs) if _may_be_registered(module) else None
    same = similar.architecture if similar is not None and similar.same_settings else None
    if _states_name(options) and (same is None or same.name != options.model):
        raise UsageError(
            f"{path} contains a whole model that differs from {options.model}",
            "leave out --model to use the model in the file",
        )
    if similar is not None and not states_input and runs_with(module, similar.architecture.input):
        size = similar.architecture.input
    if same is not None and same.name == "lzh":
        architecture = same
    else:
        name, stem = (same.name, same.stem) if same is not None else (name, "own")
        architecture = Architecture(name, stem, size, lambda *_: deepcopy(module), source, num_outputs=outputs)
    return ExternalNetwork(architecture, outputs, module.state_dict(), {}, [])


def _may_be_registered(module: nn.Module) -> bool:
    return isinstance(module, Lzh) or type(module).__module__.startswith("torchvision.")


# --- classes


def _class_finder(options: ModelOptions) -> FindClass:
    """Return a function that finds the classes of PyTorch and torchvision, and those that the options allow."""
    library = library_classes()
    model = options.model or ""
    if _names_code(options):
        code = load_user_module(model)
        return lambda name: library.get(name) or _user_class(code, name)
    package = next((package for prefix, package in _LIBRARIES.items() if model.startswith(prefix)), None)
    if package is None:
        return library.get
    return lambda name: library.get(name) or _imported_class(name, package)


def _user_class(code: ModuleType, name: str) -> type[Any] | None:
    """Return a class of the user's code by its name in a file, such as `__main__.Net` or `nets.Net`.

    The class is in a module that the user's code has imported, or in the module that the user names.
    """
    owner, _, short = name.rpartition(".")
    for module in (sys.modules.get(owner) if owner != "__main__" else None, code):
        found = getattr(module, short, None)
        if isinstance(found, type) and found.__module__.partition(".")[0] not in _NOT_USER_CODE:
            return found
    return None


def _imported_class(name: str, package: str) -> type[nn.Module | Enum] | None:
    """Return a module or an enumeration of a package by its qualified name, if what defines it has been imported."""
    owner, _, short = name.rpartition(".")
    found = getattr(sys.modules.get(owner), short, None) if name.startswith(f"{package}.") else None
    return found if isinstance(found, type) and issubclass(found, nn.Module | Enum) else None


# --- Lzh


def _lzh(path: Path, stub: ObjectStub, find_class: FindClass) -> nn.Module:
    """Return a model of the training notes, which passes the images through one `Sequential`, with its own layers."""
    parts = rebuild_module(path, stub, lambda name: nn.Module if name in _LZH else find_class(name))
    layers = list(parts.children())
    if len(layers) != 1 or not isinstance(layers[0], nn.Sequential):
        raise ModelFileError(
            f"{path} contains a model of class {stub.name}, which is not the Lzh of the training notes",
            "name the code that defines it with --model FILE.py:CALLABLE",
        )
    module = Lzh.__new__(Lzh)
    nn.Module.__init__(module)
    module.model = layers[0]
    return module.eval()


# --- stated networks


def _require_same_settings(path: Path, stub: ObjectStub, network: ExternalNetwork, find_class: FindClass) -> None:
    """Check that the layers in a file whose root class is unknown have the settings of the stated network."""
    # Unknown classes become plain containers: only the settings of their layers are known.
    parts = rebuild_module(path, stub, lambda name: find_class(name) or nn.Module)
    built = network.architecture.build(network.outputs, network.architecture.input)
    names = dict(_layer_names(network.keys, [name for name, _ in built.named_modules()]))
    found = list(different_settings(parts, built, names))
    if found:
        raise ModelFileError(
            f"the layers in {path} are not those of {network.architecture.source.name} ({list_names(found)})",
            "name the code that defines the model with --model FILE.py:CALLABLE",
        )


def _layer_names(keys: dict[str, str], own: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of the layers in the file and those of the network, from the names of their weights."""
    prefixes = set()
    for own_key, key in keys.items():
        mine, its = own_key.split("."), key.split(".")
        while mine and its and mine[-1] == its[-1]:
            mine.pop()
            its.pop()
        prefixes.add((".".join(mine), ".".join(its)))
    for name in own:
        for mine_prefix, its_prefix in prefixes:
            if not mine_prefix or name == mine_prefix or name.startswith(f"{mine_prefix}."):
                rest = name[len(mine_prefix) :].lstrip(".")
                yield ".".join(part for part in (its_prefix, rest) if part), name
