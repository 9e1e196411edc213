"""Models whose source contains the weights: a directory of Hugging Face, or a module in memory."""

from pathlib import Path

from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.initial_spec import initial_spec
from cifarx_train.models.options import NO_OPTIONS, ModelOptions, SpecOverrides
from cifarx_train.models.sources import HUGGING_FACE_PREFIX, find_architecture
from cifarx_train.models.user_networks import module_architecture


def load_model(path: Path, options: ModelOptions = NO_OPTIONS) -> Checkpoint:
    """Load a checkpoint as `load_checkpoint` does, or a directory that Hugging Face's `save_pretrained` wrote."""
    if not path.is_dir():
        return load_checkpoint(path, options)
    model = f"{HUGGING_FACE_PREFIX}{path}"
    if options.model not in (None, model):
        raise UsageError(f"{path} is a directory with its own network, not {options.model}", "leave out --model")
    return load_source_weights(options._replace(model=model))


def load_source_weights(options: ModelOptions) -> Checkpoint:
    """Return the model that `options.model` names, with the weights that come with it.

    Raises:
        UsageError: the source has no weights, or see `find_architecture`.
        ModelFileError: the weights cannot be read.
        SpecError: what is stated is not valid.
    """
    architecture = find_architecture(options)
    if architecture.weights is None:
        raise UsageError(f"--model {options.model} has no weights", "give the file with the weights with --ckpt")
    return _checkpoint(architecture, options.overrides)


def load_module(module: nn.Module, overrides: SpecOverrides) -> Checkpoint:
    """Return the model of a module in memory, which is not changed.

    Raises:
        UsageError: the module cannot be copied or run, or does not return one tensor (N, classes).
        SpecError: what is stated is not valid.
    """
    return _checkpoint(module_architecture(module, overrides), overrides)


def model_directory(options: ModelOptions) -> Path | None:
    """Return the directory that `options.model` names, or None if it names something else."""
    model = options.model or ""
    return Path(model.removeprefix(HUGGING_FACE_PREFIX)) if model.startswith(HUGGING_FACE_PREFIX) else None


def _checkpoint(architecture: Architecture, overrides: SpecOverrides) -> Checkpoint:
    assert architecture.weights is not None
    outputs = architecture.weights.num_outputs
    if outputs is None:
        names = overrides.fields.get("class_names")
        if names is None:
            raise UsageError(
                f"the number of outputs of {architecture.source.name} is not known", "state the class names"
            )
        outputs = len(names)
    spec = initial_spec(architecture, outputs, None, overrides)
    return Checkpoint(spec, architecture.weights.load(), {}, lambda: architecture.build(outputs, spec.input))
