"""Networks that come from a class, a function or a module object of the user, or of an installed package."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Final

import torch
from torch import nn

from cifarx_serve.errors import UsageError, error_message, unknown_name_error
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.architecture import Architecture, SourceWeights
from cifarx_train.models.options import SpecOverrides
from cifarx_train.models.outputs import count_outputs, runs_with
from cifarx_train.models.user_code import Reference, running_user_code

_CLASS_PARAMETERS: Final = (
    "num_classes",
    "n_classes",
    "nclasses",
    "num_class",
    "n_class",
    "nclass",
    "classes",
    "num_labels",
    "num_outputs",
    "out_features",
)
"""The names of the parameter for the number of classes, the most usual one first."""

_TRIAL_OUTPUTS: Final = 10

_TRIAL_INPUTS: Final = (
    *(InputSpec(height=side, width=side) for side in (32, 224, 64, 28, 48, 96, 128, 227, 256, 299, 384)),
    *(
        InputSpec(height=side, width=side, channels=1, color="L")
        for side in (28, 32, 224, 64, 48, 96, 128, 227, 256, 299, 384)
    ),
)
"""The inputs that are tried to find one that a network supports: those of CIFAR-10, ImageNet, MNIST and others."""


def callable_architecture(
    name: str, target: object, source: ModelSource, reference: Reference | None = None
) -> Architecture:
    """Return the architecture of a class, a function that returns a module, or a module object.

    The number of classes is passed only if the signature has a parameter for it that `source.arguments` does not set.
    The default input is the first usual one that the network supports.

    Args:
        name: the short name of the architecture.
        target: the object.
        source: what builds the network again. Its `arguments` are the keyword arguments of the callable.
        reference: the user's reference to the object, if it is not part of an installed package.

    Raises:
        UsageError: the object is none of these, does not take the arguments, raises an exception, or supports none of
            the usual inputs.
    """
    if isinstance(target, nn.Module):
        if source.arguments:
            raise UsageError(
                f"{source.name} is a module, which takes no argument {next(iter(source.arguments))}",
                "leave out --model-arg, or name its class",
            )
        architecture = _architecture(name, lambda _outputs: deepcopy(target), source, reference, fixed=True)
        weights = SourceWeights(lambda: dict(target.state_dict()), architecture.num_outputs)
        return architecture._replace(weights=weights)
    if not callable(target):
        raise UsageError(
            f"{source.name} is {type(target).__name__} {target!r}"[:200], "name a class, a function or a module"
        )
    parameter = _class_parameter(target, source)

    def build(outputs: int) -> nn.Module:
        arguments = {**source.arguments, **({parameter: outputs} if parameter else {})}
        module = target(**arguments)
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"{source.name} returns {type(module).__name__}, not a module",
                "name a class derived from torch.nn.Module, or a function that returns one",
            )
        return module

    return _architecture(name, build, source, reference, fixed=parameter is None)


def module_architecture(module: nn.Module, overrides: SpecOverrides) -> Architecture:
    """Return the architecture of a module in memory, with a copy of the module, in fp32 and on the CPU.

    Args:
        module: the module, which is not changed.
        overrides: what the user states about its input, and which of several outputs is the logits.

    Raises:
        UsageError: the module cannot be copied, or does not run with the stated input, or with any usual one.
    """
    inner = getattr(module, "_orig_mod", module)  # of torch.compile
    inner = inner.module if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel) else inner
    source = ModelSource(kind="module", name=type(inner).__name__, output=overrides.output)
    try:
        copy = deepcopy(inner).cpu().float()
    except Exception as error:  # attributes of a module can be anything
        raise UsageError(
            f"{source.name} cannot be copied ({error_message(error)})", "give a module that copy.deepcopy can copy"
        ) from error
    found = find_input(copy)
    size = overrides.apply_to_input(found or _TRIAL_INPUTS[0])
    outputs = count_outputs(copy, size, source)
    return Architecture(
        name=source.name.lower(),
        stem="own",
        input=size,
        builder=lambda _outputs, _size: deepcopy(copy),
        source=source,
        num_outputs=outputs,
        weights=SourceWeights(lambda: dict(copy.state_dict()), outputs),
    )


def _architecture(
    name: str,
    build: Callable[[int], nn.Module],
    source: ModelSource,
    reference: Reference | None,
    *,
    fixed: bool,
) -> Architecture:
    def build_for(outputs: int, _size: InputSpec) -> nn.Module:
        if reference is None:
            return build(outputs)
        with running_user_code(reference):
            return build(outputs)

    with torch.random.fork_rng(devices=[]):
        module = build_for(_TRIAL_OUTPUTS, _TRIAL_INPUTS[0])
    size = find_input(module)
    if size is None:
        # Such a network needs a size that only the user knows. `Architecture.build` reports why it does not run.
        return Architecture(name, "own", _TRIAL_INPUTS[0], build_for, source)
    outputs = count_outputs(module, size, source) if fixed else None
    return Architecture(name, "own", size, build_for, source, num_outputs=outputs)


def find_input(module: nn.Module) -> InputSpec | None:
    """Return the first of the usual inputs that a module supports, or None. The module is not changed."""
    return next((trial for trial in _TRIAL_INPUTS if runs_with(module, trial)), None)


def _class_parameter(target: Callable[..., Any], source: ModelSource) -> str | None:
    """Return the parameter for the number of classes, and check the arguments.

    Raises:
        UsageError: an argument is unknown or missing.
    """
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a callable of a library without a signature
        return None
    named = {
        parameter.name
        for parameter in parameters.values()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument in source.arguments:
        if argument not in named and not takes_any:
            if not named:
                raise UsageError(f"{source.name} takes no argument {argument}", "leave out --model-arg")
            raise unknown_name_error(f"argument of {source.name}", argument, named)
    given = set(source.arguments)
    chosen = next((name for name in _CLASS_PARAMETERS if name in named and _takes_number(parameters[name])), None)
    required = {name for name in named if parameters[name].default is inspect.Parameter.empty} - given - {chosen}
    if required:
        missing = sorted(required, key=list(parameters).index)
        raise UsageError(
            f"{source.name} needs {', '.join(missing)}",
            f"give {'it' if len(missing) == 1 else 'them'} with --model-arg, such as --model-arg {missing[0]}=VALUE",
        )
    return None if chosen in given else chosen


def _takes_number(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter is for a number, unlike one whose default is a list of class names."""
    return parameter.default is inspect.Parameter.empty or isinstance(parameter.default, int)
