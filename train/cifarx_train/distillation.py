"""Knowledge distillation: the model learns the answers of a teacher, any checkpoint or artifact.

The teacher sees exactly the images that the model is trained on, augmented and mixed, in every step: Beyer et al. 2022,
"Knowledge distillation: a good teacher is patient and consistent". Answers for images without augmentation could be
computed once, but would be those for other images.
"""

from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from cifarx_serve.backends.base import Backend, run_checked
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.progress import Progress
from cifarx_serve.spec import InputSpec, ModelSpec, WeightsRecord
from cifarx_train.checkpoints.checkpoint import file_sha256
from cifarx_train.checkpoints.external.key_matching import list_names
from cifarx_train.checkpoints.resume import ResumePoint, require_same
from cifarx_train.data.augmentation import LUMA_WEIGHTS
from cifarx_train.data.loaders.device import InputTransform
from cifarx_train.models.description import describe_classes, describe_input
from cifarx_train.models.memory_format import supports_channels_last
from cifarx_train.pytorch_backend import PyTorchBackend
from cifarx_train.recipes import Recipe

DEFAULT_WEIGHT: Final = 0.9
DEFAULT_TEMPERATURE: Final = 2.0
"""The weight that is usual for CIFAR, and of the temperatures 2 and 4 the better one for Lzh on CIFAR-10."""

_INTERPOLATIONS: Final = {"lanczos": "bicubic", "nearest": "nearest-exact"}  # PyTorch has no Lanczos filter


class Teacher:
    """A trained model that answers for images on the training device.

    Args:
        path: the checkpoint or artifact.
        class_names: the classes of the model that is trained.
        device: the training device.

    Attributes:
        record: the file.
        spec: what the teacher is.
        runs_on_device: whether it is a PyTorch network on the training device, which a CUDA graph can capture.

    Raises:
        UsageError: no backend opens the file, or the teacher does not tell the classes apart.
        ModelFileError: the file is damaged.
    """

    def __init__(self, path: Path, class_names: tuple[str, ...], device: torch.device) -> None:
        try:
            self._backend: Backend = open_backend(path, device=str(device))
        except UsageError as error:  # a checkpoint does not say what its network is
            raise UsageError(
                f"the teacher {path} cannot be opened ({error.problem})",
                "export it with `cifarx export --ckpt FILE --model SOURCE --format onnx`, and give that file",
            ) from error
        self._path = path
        self.record = WeightsRecord(name=path.name, sha256=file_sha256(path))
        self.spec: ModelSpec = self._backend.spec
        columns = _class_columns(path, self.spec, class_names)
        self._columns = None if columns == list(range(len(columns))) else torch.tensor(columns, device=device)
        self._device = device
        self._resize = _Resize(self.spec.input, device)
        self._network: torch.nn.Module | None = None
        if isinstance(self._backend, PyTorchBackend):
            self._network = self._backend.network.requires_grad_(False)
            channels_last = supports_channels_last(self._network, self.spec.input)
            self._transform = InputTransform(self.spec.input, device, channels_last=channels_last)
        self.runs_on_device = self._network is not None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of the model's classes, float32 (N, classes), on the device.

        Args:
            images: uint8 (N, height, width, channels), on the device, of any size.
        """
        pixels = self._resize(images)
        if self._network is not None:
            outputs: Tensor = self._network(self._transform(pixels))
        else:
            batch = model_input(pixels.cpu().numpy(), self.spec)
            outputs = torch.from_numpy(run_checked(self._backend, batch, str(self._path))).to(self._device)
        if self.spec.output == "probabilities":
            outputs = outputs.clamp_min(torch.finfo(torch.float32).tiny).log()
        if self.spec.outputs == 1:  # the logit of the second of two classes
            outputs = torch.cat((torch.zeros_like(outputs), outputs), 1)
        return outputs if self._columns is None else outputs[:, self._columns]


def open_teacher(
    path: Path | None,
    class_names: tuple[str, ...],
    device: torch.device,
    point: ResumePoint | None,
    progress: Progress,
) -> Teacher | None:
    """Open the teacher of a run, and report what it is.

    Args:
        path: the file, or None for a run without a teacher.
        class_names: the classes of the model that is trained.
        device: the training device.
        point: the checkpoint that the run resumes from, or None.
        progress: receives a line about it.

    Raises:
        UsageError: the resumed run had another teacher, or see `Teacher`.
        ModelFileError: the file is damaged.
    """
    if path is None:
        return None
    teacher = Teacher(path, class_names, device)
    if point:
        recorded = point.record.teacher
        sha256 = recorded.sha256[:12] if recorded else "of no file"
        require_same(point, "the teacher with sha256", sha256, teacher.record.sha256[:12])
    spec = teacher.spec
    progress(
        f"teacher {path.name} ({spec.model}): {describe_classes(spec.class_names)}, images resized to "
        f"{describe_input(spec.input)}"
    )
    if device.type == "cuda" and not teacher.runs_on_device:
        progress(f"note: {path.name} cannot be part of a CUDA graph: training is faster with a checkpoint as teacher")
    return teacher


class _Resize:
    """Converts images to the size and the channels of a network's input. Takes and returns uint8 (N, H, W, channels).

    The images were cropped already, so they are resized as a whole.
    """

    def __init__(self, spec: InputSpec, device: torch.device) -> None:
        self._spec = spec
        self._luma_weights = torch.tensor(LUMA_WEIGHTS, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        spec = self._spec
        if images.shape[3] != spec.channels:
            if spec.channels == 3:
                images = images.expand(-1, -1, -1, 3)
            else:
                images = (images * self._luma_weights).sum(3, keepdim=True).round_().to(torch.uint8)
        if images.shape[1:3] == (spec.height, spec.width):
            return images
        mode = _INTERPOLATIONS.get(spec.interpolation, spec.interpolation)
        resized = functional.interpolate(
            images.permute(0, 3, 1, 2).float(),
            (spec.height, spec.width),
            mode=mode,
            antialias=spec.antialias and mode != "nearest-exact",
        )
        return resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def complete_recipe(recipe: Recipe, *, has_teacher: bool) -> Recipe:
    """Return the recipe with the defaults of a distillation, if there is a teacher.

    Raises:
        UsageError: there is none, but the recipe sets what concerns one.
    """
    if has_teacher:
        return recipe.complete(distillation_weight=DEFAULT_WEIGHT, distillation_temperature=DEFAULT_TEMPERATURE)
    for field in ("distillation_weight", "distillation_temperature"):
        if getattr(recipe, field) is not None:
            raise UsageError(f"{field} needs a teacher", "give one with --teacher FILE")
    return recipe


def _class_columns(path: Path, spec: ModelSpec, class_names: tuple[str, ...]) -> list[int]:
    """Return the position of each class among those of the teacher.

    Raises:
        UsageError: the teacher does not have all of the classes, or gives an image several of them.
    """
    if spec.multi_label:
        raise UsageError(f"the teacher {path} gives an image several labels", "give a teacher with one label per image")
    known = {name: position for position, name in enumerate(spec.class_names)}
    if missing := [name for name in class_names if name not in known]:
        raise UsageError(
            f"the teacher {path} does not know {len(missing)} of {len(class_names)} classes ({list_names(missing)})",
            "give a teacher with the classes of the data",
        )
    return [known[name] for name in class_names]
