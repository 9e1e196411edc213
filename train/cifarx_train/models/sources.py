"""Find the network that `--model` names: one of the registry, of another library or package, or the user's own.

| value | network |
| --- | --- |
| `lzh`, `resnet18` | of the registry: built in, or torchvision's |
| `timm/NAME` | of timm (extra `timm`) |
| `hf/DIRECTORY` | of a directory that Hugging Face's `save_pretrained` wrote (extra `hf`) |
| `FILE.py:CALLABLE`, `package.module:CALLABLE` | the user's own |
| any other name | of the entry-point group `cifarx.models` of an installed package |
"""

import re
import shlex
import warnings
from functools import cache
from importlib import import_module
from typing import Final

from cifarx_serve.errors import FallbackWarning, UsageError, unknown_name_error
from cifarx_serve.spec import ModelSource, ModelSpec
from cifarx_train.models.architecture import Architecture, Stem, no_small_stem_error
from cifarx_train.models.options import NO_OPTIONS, ModelOptions
from cifarx_train.models.registry import get_architecture, is_registered, list_models
from cifarx_train.models.user_code import is_reference, load_user_object, parse_reference, source_sha256
from cifarx_train.models.user_networks import callable_architecture

GROUP: Final = "cifarx.models"
"""The entry-point group of networks. The name of an entry is the name of the network, its value a class or function."""

TIMM_PREFIX: Final = "timm/"
HUGGING_FACE_PREFIX: Final = "hf/"


def find_architecture(options: ModelOptions, stem: Stem = "own") -> Architecture:
    """Return the architecture that the options name. The user's code is imported only here.

    Args:
        options: the user's options, with a `model`.
        stem: "small" for a torchvision ResNet with a stem for small images.

    Raises:
        UsageError: there is no such network, its extra is not installed, or it does not take the arguments.
    """
    model = options.model
    assert model is not None
    if stem == "small" and not is_registry_name(model):
        raise no_small_stem_error(model)
    if model.startswith(TIMM_PREFIX):
        from cifarx_train.models.timm_networks import timm_architecture

        stated = options.overrides.fields.get("input", {})
        sides = (stated[side] if isinstance(stated.get(side), int) else None for side in ("height", "width"))
        return timm_architecture(model.removeprefix(TIMM_PREFIX), options.arguments, *sides)
    if model.startswith(HUGGING_FACE_PREFIX):
        from cifarx_train.models.hugging_face import directory_architecture

        return directory_architecture(model.removeprefix(HUGGING_FACE_PREFIX), options.arguments)
    if is_reference(model):
        return _user_architecture(options)
    if is_registered(model):
        return get_architecture(model, stem=stem, arguments=options.arguments)
    if model in _entry_points():
        return _entry_point_architecture(model, options)
    error = unknown_name_error("model", model, [*list_models(), *_entry_points()])
    raise UsageError(error.problem, f"{error.remedy}, or name your own as FILE.py:CALLABLE")


def is_registry_name(model: str) -> bool:
    """Return whether a value of `--model` has the form of a name, rather than of a path or of code."""
    return not (model.startswith((TIMM_PREFIX, HUGGING_FACE_PREFIX)) or is_reference(model))


def rebuild_architecture(spec: ModelSpec, options: ModelOptions = NO_OPTIONS) -> Architecture:
    """Return the architecture of a checkpoint that cifarx wrote, from its spec.

    Args:
        spec: the spec in the checkpoint.
        options: the user's options. They must name the user's own code again, because a file never decides which code
            runs. Otherwise a `model` has to be the one in the spec.

    Raises:
        UsageError: the options name another network, or do not name the user's code; or see `find_architecture`.
    """
    source = spec.source or ModelSource(kind="builtin", name=spec.model)
    arguments = {**source.arguments, **options.arguments}
    match source.kind:
        case "python":
            return _rebuild_user_architecture(source, options)
        case "timm":
            _require_model(options, f"{TIMM_PREFIX}{source.name}")
            return find_architecture(ModelOptions(f"{TIMM_PREFIX}{source.name}", arguments))
        case "huggingface":
            from cifarx_train.models.hugging_face import config_architecture

            return config_architecture(source, spec.input)
        case "builtin" | "torchvision" | "entry_point":
            _require_model(options, source.name)
            return find_architecture(ModelOptions(source.name, arguments, overrides=options.overrides), spec.stem)
    raise UsageError(
        f"the network was given as a {source.kind} ({source.name}), which cannot be built again",
        "state its code with --model FILE.py:CALLABLE",
    )


def _require_model(options: ModelOptions, name: str) -> None:
    if options.model not in (None, name):
        raise UsageError(f"the checkpoint is one of {name}, not of {options.model}", "leave out --model")


# --- the user's own code


def _user_architecture(options: ModelOptions) -> Architecture:
    assert options.model is not None
    reference = parse_reference(options.model)
    target = load_user_object(options.model)
    source = ModelSource(
        kind="python",
        name=reference.portable,
        arguments=dict(options.arguments),
        sha256=source_sha256(options.model),
        output=options.overrides.output,
    )
    return callable_architecture(_short_name(reference.name), target, source, reference)


def _rebuild_user_architecture(source: ModelSource, options: ModelOptions) -> Architecture:
    if options.model is None or not is_reference(options.model):
        raise UsageError(
            f"the network is that of {source.name}, and a checkpoint never decides which code runs",
            f"state it with --model {shlex.quote(source.name)}",
        )
    arguments = {**source.arguments, **options.arguments}
    architecture = _user_architecture(options._replace(arguments=arguments))
    if source.sha256 is not None and architecture.source.sha256 != source.sha256:
        warnings.warn(
            f"the code of {options.model} is not the one that the checkpoint was trained with: its sha256 is "
            f"{str(architecture.source.sha256)[:12]}, not {source.sha256[:12]}",
            FallbackWarning,
            stacklevel=2,
        )
    return architecture


def _short_name(name: str) -> str:
    """Return a name for file names: `net` for `Net`, `small` for `nets.Small`."""
    return name.rpartition(".")[2].lower()


# --- other packages


def _entry_point_architecture(name: str, options: ModelOptions) -> Architecture:
    target = _entry_points()[name]
    module, _, attribute = target.partition(":")
    try:
        loaded = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"model {name} ({target}) cannot be loaded ({error})", "fix or reinstall its package"
        ) from error
    source = ModelSource(
        kind="entry_point", name=name, arguments=dict(options.arguments), output=options.overrides.output
    )
    return callable_architecture(re.sub(r"\W", "_", name), loaded, source)


@cache
def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=GROUP)}
