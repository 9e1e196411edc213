"""The options with which several commands describe a network and its images, and what they mean.

A command receives them together: it has one parameter `flags`, and a decorator adds the options to its signature.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, TypeVar, get_type_hints

import msgspec
import typer

from cifarx_serve.errors import UsageError

if TYPE_CHECKING:
    from cifarx_serve.spec import ModelSpec
    from cifarx_train.models.options import ModelOptions, SpecOverrides

SOURCE_HELP: Final = (
    "Network: a name such as lzh or resnet18, timm/NAME, hf/DIRECTORY, FILE.py:CALLABLE or package.module:CALLABLE."
)

ModelArguments: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="KEY=VALUE", help="Argument of the network's class or function. Repeatable."),
]
WeightsKey: TypeAlias = Annotated[
    str | None,
    typer.Option("--weights-key", metavar="KEY", help="Key of the weights in a file with several sets of weights."),
]
SpecFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--spec", metavar="FILE", help="TOML or JSON file with fields of the model spec; see `inspect --spec-template`."
    ),
]
Classes: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="NAMES|FILE",
        help="Class names in label order, separated by commas, or a file: one per line, a JSON list or class_to_idx.",
    ),
]
PreprocessingName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--preprocessing",
        metavar="NAME|FILE",
        help="Preprocessing: imagenet (resize to 256, crop 224, normalize), cifarx (only resize), or a file of fields.",
    ),
]
ImageSize: TypeAlias = Annotated[
    str | None,
    typer.Option("--image-size", metavar="N|HxW", help="Size of the network's images in pixels, as 224 or 224x160."),
]
Mean: TypeAlias = Annotated[
    str | None,
    typer.Option("--mean", metavar="M,M,M", help="Mean to subtract per channel, on the scale of 0 to 1."),
]
Std: TypeAlias = Annotated[
    str | None, typer.Option("--std", metavar="S,S,S", help="Standard deviation to divide by, per channel.")
]
ColorName: TypeAlias = Annotated[
    Literal["RGB", "BGR", "L"] | None,
    typer.Option("--color", help="Order of the channels; L is grayscale with one channel."),
]
ActivationName: TypeAlias = Annotated[
    Literal["softmax", "sigmoid"] | None,
    typer.Option(
        "--activation", help="softmax for one label per image; sigmoid for several, or for two classes with one output."
    ),
]


class ImageFlags(msgspec.Struct, frozen=True, kw_only=True):
    """The options that describe how images become the input of a network."""

    spec: SpecFile = None
    preprocessing: PreprocessingName = None
    image_size: ImageSize = None
    mean: Mean = None
    std: Std = None
    color: ColorName = None


class FileFlags(ImageFlags, frozen=True, kw_only=True):
    """The options of a command that reads a file which contains its whole network."""

    classes: Classes = None
    activation: ActivationName = None


class InputFlags(ImageFlags, frozen=True, kw_only=True):
    """The options of a command that builds a new network."""

    model_arg: ModelArguments = None


class ModelFlags(InputFlags, frozen=True, kw_only=True):
    """The options of a command that reads the weights of a network."""

    weights_key: WeightsKey = None
    classes: Classes = None
    activation: ActivationName = None

    @property
    def are_given(self) -> bool:
        """Whether any of the options was given."""
        return self != NO_MODEL_FLAGS


NO_FILE_FLAGS: Final = FileFlags()
NO_INPUT_FLAGS: Final = InputFlags()
NO_MODEL_FLAGS: Final = ModelFlags()

Command = TypeVar("Command", bound=Callable[..., Any])


def takes_flags(kind: type[ImageFlags]) -> Callable[[Command], Command]:
    """Return a decorator that replaces the parameter `flags` of a command by the options of a class of flags."""

    def decorate(command: Command) -> Command:
        hints = get_type_hints(kind, include_extras=True)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
            for name, hint in hints.items()
        ]

        @wraps(command)
        def run(**values: Any) -> Any:
            flags = kind(**{name: values.pop(name) for name in hints})
            return command(**values, flags=flags)

        parameters = list(inspect.signature(command, eval_str=True).parameters.values())
        position = next(index for index, parameter in enumerate(parameters) if parameter.name == "flags")
        replaced = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*parameters[:position], *added, *parameters[position + 1 :])
        ]
        run.__signature__ = inspect.Signature(replaced)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in replaced}
        return run  # type: ignore[return-value]

    return decorate


def model_options(model: str | None, flags: InputFlags) -> "ModelOptions":
    """Return what the user states about a model. A spec file names the network where `--model` does not.

    Args:
        model: the value of `--model`.
        flags: the other options.

    Raises:
        UsageError: a value is not valid, or a file cannot be read.
    """
    from cifarx_train.models.arguments import parse_arguments
    from cifarx_train.models.options import ModelOptions

    weights_key = flags.weights_key if isinstance(flags, ModelFlags) else None
    options = ModelOptions(model, parse_arguments(flags.model_arg or ()), weights_key, spec_overrides(flags))
    stated = options.with_network()
    if options.arguments and stated.model is None:
        raise UsageError("--model-arg was given without --model", "name the network that takes the argument")
    return stated


def read_stated_spec(file: str, options: "ModelOptions | None") -> "ModelSpec":
    """Return the spec of a file; for a checkpoint, with what the options state about it.

    Raises:
        UsageError: no backend opens such a file, or the options name no network that fits.
        ModelFileError: the file is missing or damaged, or contains no spec.
        SpecError: the spec is malformed, or what is stated is not valid.
    """
    from cifarx_serve.backends.registry import model_file, read_spec

    if not model_file(Path(file)).is_dir() and (options is None or not is_checkpoint(file)):
        return read_spec(file)
    from cifarx_train.checkpoints.source_weights import load_model
    from cifarx_train.models.options import NO_OPTIONS

    return load_model(Path(file), options or NO_OPTIONS).spec


def note_description(spec: "ModelSpec", file: str, options: "ModelOptions") -> None:
    """Print what a model takes and gives, and who states it, before it is used."""
    from cifarx.output.console import note
    from cifarx_train.models.description import describe_model

    for line in describe_model(spec, Path(file).name, options.origins):
        note(line)


def stated_options(files: Sequence[str], model: str | None, flags: ModelFlags) -> "ModelOptions | None":
    """Return what the user states about the checkpoints among files, or None if no option was given.

    Raises:
        UsageError: none of the files is a checkpoint, or see `model_options`.
        ModelFileError: a file does not exist.
    """
    if model is None and not flags.are_given:
        return None
    if not any(map(is_checkpoint, files)):
        verb = "contains its" if len(files) == 1 else "contain their"
        raise UsageError(f"{', '.join(files)} {verb} own spec", "give what describes a model only with a checkpoint")
    return model_options(model, flags)


def is_checkpoint(file: str) -> bool:
    """Return whether a file is a checkpoint. An artifact, in contrast, contains its own spec.

    Raises:
        ModelFileError: the file does not exist.
    """
    from cifarx_serve.backends.base import require_file
    from cifarx_serve.backends.registry import backend_for, model_file

    path = model_file(Path(file))
    if path.is_dir():
        return True
    require_file(path)
    return backend_for(path).name == "pytorch"


def spec_overrides(flags: ImageFlags) -> "SpecOverrides":
    """Return the fields of the spec that the options state. The more specific option wins.

    Raises:
        UsageError: a value is not valid, or a file cannot be read.
    """
    from cifarx.option_values import parse_classes
    from cifarx_train.models.options import SpecOverrides
    from cifarx_train.models.spec_file import read_spec_file

    stated = read_spec_file(flags.spec) if flags.spec else SpecOverrides()
    fields, origins = dict(stated.fields), dict(stated.origins)
    input_, given = _input_fields(flags)
    if flags.preprocessing is None:
        input_ = {**fields.get("input", {}), **input_}
    if input_:
        fields["input"] = input_
        origins["input"] = ", ".join([*([origins["input"]] if "input" in origins else []), *given])
    if isinstance(flags, ModelFlags | FileFlags):
        if flags.classes is not None:
            fields["class_names"], origins["class_names"] = parse_classes(flags.classes), "--classes"
        if flags.activation is not None:
            fields["activation"], origins["activation"] = flags.activation, "--activation"
    return SpecOverrides(fields, stated.whole_input or flags.preprocessing is not None, origins, stated.network)


def _input_fields(flags: ImageFlags) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of the input that the options other than `--spec` state, and the names of these options."""
    from cifarx.option_values import parse_image_size, parse_numbers, parse_preprocessing

    size = None if flags.image_size is None else parse_image_size(flags.image_size)
    fields: dict[str, Any] = {}
    if flags.preprocessing is not None:
        fields = parse_preprocessing(flags.preprocessing, size)
    elif size:
        fields = {"height": size[0], "width": size[1]}
    for name in ("mean", "std"):
        if (text := getattr(flags, name)) is not None:
            fields[name] = parse_numbers(f"--{name}", text)
    if flags.color is not None:
        fields["color"] = flags.color
    names = ("preprocessing", "image_size", "mean", "std", "color")
    return fields, [f"--{name.replace('_', '-')}" for name in names if getattr(flags, name) is not None]
