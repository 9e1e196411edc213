"""Image classifiers in directories that `save_pretrained` of Hugging Face's transformers wrote.

Only files of the directory are read: nothing is downloaded, and code in the directory is never run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from cifarx_serve.errors import ModelFileError, UsageError, error_message
from cifarx_serve.spec import Activation, InputSpec, ModelSource
from cifarx_train.models.architecture import Architecture, SourceWeights
from cifarx_train.models.image_processor import processor_input

try:
    import transformers
except ModuleNotFoundError as missing:
    raise UsageError("transformers is not installed", 'pip install "cifarx[hf]"') from missing

CONFIG_FILE: Final = "config.json"
PROCESSOR_FILE: Final = "preprocessor_config.json"
WEIGHTS_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files that hold the weights, or name the files that do, in the order of preference."""

_LOCAL: Final[Mapping[str, Any]] = MappingProxyType({"local_files_only": True, "trust_remote_code": False})
_LOADING_PROBLEMS: Final = ("missing_keys", "mismatched_keys", "unexpected_keys")
_LABEL_KEYS: Final = ("id2label", "label2id", "num_labels")
_LOCAL_ATTENTION: Final = (None, "eager", "sdpa")
"""The implementations of attention that are part of PyTorch and transformers. Any other name can be that of code on the
Hugging Face hub, which transformers downloads and runs."""


def is_model_directory(path: Path) -> bool:
    """Return whether a path is a directory that `save_pretrained` wrote."""
    return (path / CONFIG_FILE).is_file()


def weights_file(directory: Path) -> Path | None:
    """Return the file that holds or lists the weights in a directory, or None if there is none."""
    return next((directory / name for name in WEIGHTS_FILES if (directory / name).is_file()), None)


def directory_architecture(name: str, arguments: Mapping[str, Any]) -> Architecture:
    """Return the architecture, the class names, the preprocessing and the weights of a directory.

    Args:
        name: the path of the directory.
        arguments: values that replace those of `config.json`.

    Raises:
        UsageError: there is no such directory, or it does not contain an image classifier.
        SpecError: a spec cannot describe its preprocessing.
    """
    directory = Path(name)
    if not is_model_directory(directory):
        raise UsageError(
            f"there is no {CONFIG_FILE} in {name}",
            "give a directory that save_pretrained wrote; cifarx downloads nothing",
        )
    config = _read_config(directory, arguments)
    size = _processor_input(directory)
    source = ModelSource(kind="huggingface", name=directory.resolve().name, arguments={"config": _portable(config)})
    return _architecture(config, source, size)._replace(
        class_names=_class_names(config),
        states_input=size is not None,
        weights=_source_weights(directory, config),
    )


def config_architecture(source: ModelSource, size: InputSpec) -> Architecture:
    """Return the architecture of a configuration that `directory_architecture` put into a spec.

    Raises:
        UsageError: the configuration is not one of an image classifier.
    """
    fields = dict(source.arguments.get("config", {}))
    try:
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # transformers checks configurations with many kinds of exceptions
        raise UsageError(
            f"the configuration of {source.name} is not supported by transformers {transformers.__version__} "
            f"({error_message(error)})",
            "install the version that it was trained with",
        ) from error
    return _architecture(config, source, size)


def _architecture(config: Any, source: ModelSource, size: InputSpec | None) -> Architecture:
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UsageError(
            f"{source.name} is a {config.model_type}, which is no image classifier", "give an image classifier"
        )
    if config.problem_type == "regression":
        raise UsageError(f"{source.name} predicts numbers, not classes (regression)", "give an image classifier")
    _require_local(config, source)
    default = size or _default_input(config)

    def build(outputs: int, requested: InputSpec) -> nn.Module:
        changed = deepcopy(config)
        if outputs != changed.num_labels:
            changed.num_labels = outputs
        if (requested.height, requested.width) != (default.height, default.width) and hasattr(changed, "image_size"):
            square = requested.height == requested.width
            changed.image_size = requested.height if square else (requested.height, requested.width)
        if requested.channels != default.channels:
            changed.num_channels = requested.channels
        return _build(changed, source)

    name = source.name.lower()
    several = config.problem_type == "multi_label_classification"
    # By default, transformers trains a single output as a regression, so nothing states that it is a class.
    activation: Activation | None = "sigmoid" if several else "softmax" if config.num_labels > 1 else None
    return Architecture(
        name,
        "own",
        default,
        build,
        source,
        activation=activation,
        convert_weights=lambda weights: _convert_weights(config, weights),
    )


def _require_local(config: Any, source: ModelSource) -> None:
    """Check that the configuration, or a part of it, does not make transformers download code or another network.

    Raises:
        UsageError: it does.
    """
    attention, network = config._attn_implementation, getattr(config, "architecture", "")
    if attention not in _LOCAL_ATTENTION:
        raise UsageError(
            f"{source.name} asks for the attention {attention!r}, which transformers may download",
            'set attn_implementation to "sdpa" or "eager" in its config.json',
        )
    if isinstance(network, str) and ":" in network:
        raise UsageError(
            f"{source.name} asks timm for {network!r}, which it would load from elsewhere",
            "name a network of timm as the architecture in its config.json",
        )
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            _require_local(part, source)


def _convert_weights(config: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with the names of the module; transformers saves some networks with those of old versions."""
    model = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    model = model[0] if isinstance(model, tuple) else model
    try:
        with _quiet():
            module, found = model.from_pretrained(
                None, config=config, state_dict=dict(weights), dtype="float32", output_loading_info=True
            )
    except Exception:  # see `config_architecture`
        return weights
    problems = [found[kind] for kind in _LOADING_PROBLEMS]
    return weights if any(problems) else dict(module.state_dict())


def _build(config: Any, source: ModelSource) -> nn.Module:
    try:
        with _quiet():
            module: nn.Module = transformers.AutoModelForImageClassification.from_config(
                config, trust_remote_code=False, dtype="float32"
            )
    except Exception as error:  # see `config_architecture`
        raise UsageError(
            f"{source.name} cannot be built ({error_message(error)})", "correct its config.json, or --image-size"
        ) from error
    return module


def _read_config(directory: Path, arguments: Mapping[str, Any]) -> Any:
    try:
        with _quiet():
            config, unused = transformers.AutoConfig.from_pretrained(
                directory, return_unused_kwargs=True, **_LOCAL, **arguments
            )
    except Exception as error:  # see `config_architecture`
        raise ModelFileError(
            f"{directory / CONFIG_FILE} cannot be read ({error_message(error)})", "save the model again"
        ) from error
    if unknown := [argument for argument in arguments if argument in unused]:
        raise UsageError(f"{directory / CONFIG_FILE} has no {unknown[0]}", "leave out that --model-arg")
    return config


def _portable(config: Any) -> dict[str, Any]:
    """Return the configuration without the class names, which are in the spec, and without paths."""
    fields: dict[str, Any] = config.to_dict()
    return {key: value for key, value in fields.items() if key not in _LABEL_KEYS and not key.startswith("_")}


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Return the class names in the order of their labels; None for the placeholders `LABEL_0`, `LABEL_1` …"""
    names = tuple(str(config.id2label[label]) for label in sorted(config.id2label))
    placeholders = tuple(f"LABEL_{label}" for label in range(len(names)))
    return None if names == placeholders or len(names) < 2 else names


def _source_weights(directory: Path, config: Any) -> SourceWeights | None:
    if weights_file(directory) is None:
        return None
    return SourceWeights(lambda: _read_weights(directory, config), config.num_labels)


def _read_weights(directory: Path, config: Any) -> dict[str, Any]:
    """Return the state dict in a directory.

    Raises:
        ModelFileError: the weights cannot be read, or are not those of the configuration.
    """
    try:
        with _quiet():
            module, found = transformers.AutoModelForImageClassification.from_pretrained(
                directory, config=config, dtype="float32", output_loading_info=True, weights_only=True, **_LOCAL
            )
    except Exception as error:  # see `config_architecture`
        raise ModelFileError(
            f"the weights in {directory} cannot be read ({error_message(error)})", "save the model again"
        ) from error
    for kind in _LOADING_PROBLEMS:
        if keys := sorted(map(str, found[kind])):
            raise ModelFileError(
                f"{len(keys)} {kind.replace('_', ' ')} in the weights in {directory} ({', '.join(keys[:5])})",
                "save the whole classifier with save_pretrained",
            )
    return dict(module.state_dict())


def _processor_input(directory: Path) -> InputSpec | None:
    """Return the preprocessing of the processor in a directory, or None if there is no processor."""
    if not (directory / PROCESSOR_FILE).is_file():
        return None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(directory, **_LOCAL)
    except Exception as error:  # see `config_architecture`
        raise ModelFileError(
            f"{directory / PROCESSOR_FILE} cannot be read ({error_message(error)})", "save the processor again"
        ) from error
    return processor_input(processor)


def _default_input(config: Any) -> InputSpec:
    side = getattr(config, "image_size", None)
    height, width = side if isinstance(side, tuple | list) else (side or 224, side or 224)
    return InputSpec(height=height, width=width)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notes and the progress bars of transformers in a `with` block."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
