"""Networks of the library timm, its published weights, and the preprocessing that it configures for them."""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cifarx_serve.errors import SpecError, UsageError, error_message, unknown_name_error
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.preprocessing_check import require_same_preprocessing

try:
    import timm
    import timm.data
except ModuleNotFoundError as missing:
    raise UsageError("timm is not installed", 'pip install "cifarx[timm]"') from missing

_INTERPOLATIONS: Final = ("nearest", "bilinear", "bicubic", "lanczos")


def timm_architecture(
    name: str, arguments: Mapping[str, Any], height: int | None = None, width: int | None = None
) -> Architecture:
    """Return the architecture of a network of timm.

    Args:
        name: the name, with or without the tag of published weights, which selects their preprocessing.
        arguments: keyword arguments of `timm.create_model`.
        height, width: the size of the images, from which timm computes the size before the crop. By default it is the
            argument `img_size`, or that of the published weights.

    Raises:
        UsageError: timm has no such network. Building it raises the error for arguments that it does not take.
        SpecError: a spec cannot describe its preprocessing.
    """
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=3)
        raise UsageError(
            f"timm {timm.__version__} has no network {base!r}",
            (f"did you mean {', '.join(near)}? " if near else "") + "`timm.list_models()` lists them",
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise unknown_name_error(f"tag of timm/{base}", tag, tags)
    config = timm.get_pretrained_cfg(name)
    published = timm.data.resolve_data_config({"in_chans": 3}, config.to_dict() if config else {})
    usual_size = tuple(published["input_size"][1:])
    size = timm_input({**published, "input_size": (3, *_image_size(arguments, height, width, usual_size))})

    def build(outputs: int, requested: InputSpec) -> nn.Module:
        options: dict[str, Any] = {"num_classes": outputs}
        if requested.channels != 3:
            options["in_chans"] = requested.channels
        if (requested.height, requested.width) == usual_size:
            return _create_model(name, {**options, **arguments})
        try:  # transformers need the size of the images, other networks do not take it
            return _create_model(name, {**options, "img_size": (requested.height, requested.width), **arguments})
        except UsageError:
            return _create_model(name, {**options, **arguments})

    names = getattr(config, "label_names", None)
    return Architecture(
        name=base,
        stem="own",
        input=size,
        builder=build,
        source=ModelSource(kind="timm", name=name, arguments=dict(arguments)),
        class_names=tuple(map(str, names)) if names else None,
        states_input=True,
        num_outputs=arguments.get("num_classes"),
    )


def _image_size(
    arguments: Mapping[str, Any], height: int | None, width: int | None, usual: tuple[int, ...]
) -> tuple[int, int]:
    match arguments.get("img_size"):
        case int(side):
            usual = side, side
        case (int(), int()) as sides:
            usual = tuple(sides)
    return height or usual[0], width or usual[1]


def load_published(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published weights of a network, which timm downloads if they are not in its cache.

    Args:
        name: the name, with or without the tag of the weights.
        arguments: keyword arguments of `timm.create_model`.

    Raises:
        UsageError: there are none, or they cannot be downloaded.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UsageError(f"timm publishes no weights of {name}", "give a file with --weights FILE")
    try:
        options = {key: value for key, value in arguments.items() if key != "num_classes"}
        module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the Hugging Face hub, torch.hub and timm raise many kinds of exceptions
        raise UsageError(
            f"timm's weights of {name} cannot be loaded from {_cache(config)} or downloaded ({error_message(error)})",
            "give a file with --weights FILE",
        ) from error
    return dict(module.state_dict())


def _cache(config: Any) -> str:
    """Return the directory in which timm keeps the weights of a network."""
    if config.hf_hub_id:
        from huggingface_hub import constants

        return str(constants.HF_HUB_CACHE)
    return str(Path(torch.hub.get_dir()) / "checkpoints")


def timm_input(config: Mapping[str, Any]) -> InputSpec:
    """Return the preprocessing of a data configuration of timm, as `timm.data.resolve_data_config` returns it.

    This is what `timm.data.create_transform` does for evaluation in the crop modes center, squash and border.

    Raises:
        SpecError: a spec cannot describe it.
    """
    channels, height, width = config["input_size"]
    interpolation, crop_mode = config["interpolation"], config.get("crop_mode") or "center"
    resized = [math.floor(side / (config.get("crop_pct") or timm.data.DEFAULT_CROP_PCT)) for side in (height, width)]
    if interpolation not in _INTERPOLATIONS:
        raise SpecError(f"timm's interpolation {interpolation} is not supported", "state another one with --spec")
    if crop_mode == "border" and resized != [height, width]:
        raise SpecError(
            "timm's crop mode border with a crop_pct below 1 is not supported", "state the preprocessing with --spec"
        )
    if crop_mode == "center" and height != width:
        raise SpecError(f"timm's center crop to {height}x{width} is not supported", "state another one with --spec")
    spec = InputSpec(
        height=height,
        width=width,
        channels=channels,
        color="L" if channels == 1 else "RGB",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=interpolation,
        **_resize_fields(crop_mode, resized, config["mean"]),
    )
    transform = timm.data.create_transform(**config, is_training=False)

    def preprocess(image: Image.Image) -> NDArray[np.float32]:
        pixels: NDArray[np.float32] = transform(image.convert("L") if channels == 1 else image).numpy()
        return pixels

    return require_same_preprocessing(spec, preprocess, "timm's transform")


def model_input_config(model: nn.Module) -> dict[str, Any]:
    """Return the data configuration of a model of timm."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return config


def _resize_fields(crop_mode: str, resized: list[int], mean: tuple[float, ...]) -> dict[str, Any]:
    match crop_mode:
        case "squash":
            return {"resize": "stretch", "resize_to": tuple(resized)}
        case "border":
            return {"resize": "letterbox", "fill": tuple(round(255 * value) for value in mean)}
    return {"resize": "shorter_side", "resize_to": resized[0]}


def _create_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(name, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UsageError(
            f"timm/{name} cannot be built with {given} ({error_message(error)})", "correct --model-arg or --image-size"
        ) from error
    return module
