"""Files that the tests of `cifarx_export` share. Tests must not write next to them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

IMAGES_PER_CLASS = 101
"""With ten classes, slightly more than a thousand images, a number that no batch size divides."""


@pytest.fixture(scope="session")
def checkpoint(trained: Any) -> Path:
    """Return a trained checkpoint."""
    return Path(trained.checkpoint)


@pytest.fixture(scope="session")
def good_onnx(trained: Any) -> Path:
    """Return the ONNX file of `checkpoint`."""
    return Path(trained.onnx)


@pytest.fixture(scope="session")
def good_torchscript(trained: Any) -> Path:
    """Return the TorchScript file of `checkpoint`."""
    return Path(trained.torchscript)


@pytest.fixture
def artifact_folder(trained: Any, tmp_path: Path) -> Path:
    """Return a copy of the folder with the checkpoint, its artifacts and their reports."""
    return Path(shutil.copytree(trained.folder, tmp_path / "copied"))


@pytest.fixture(scope="session")
def other_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with the spec of `checkpoint` and weights of another seed."""
    import torch

    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from cifarx_train.models.registry import get_architecture

    loaded = load_checkpoint(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = get_architecture(loaded.spec.model).build(len(loaded.spec.class_names))
    path = tmp_path_factory.mktemp("stale") / checkpoint.name
    save_checkpoint(path, loaded._replace(weights=other.state_dict()))
    return path


@pytest.fixture(scope="session")
def parity_images(checkpoint: Path) -> Any:
    """Return images of the built-in data: more than the small batches use, and not a multiple of any batch size."""
    from cifarx_export.parity.data import MIN_IMAGES, load_parity_data
    from cifarx_train.checkpoints.checkpoint import load_checkpoint

    whole = load_parity_data(load_checkpoint(checkpoint).spec, "builtin")
    assert whole.labels is not None
    images = MIN_IMAGES + 3
    return whole._replace(images=whole.images[:images], labels=whole.labels[:images])


@pytest.fixture(scope="session")
def confident_checkpoint(checkpoint: Path, parity_images: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint with the logits of each class standardized over the images, next to its ONNX file.

    Although the network has learned little, it predicts every class, and few of its predictions are close.
    """
    import torch

    from cifarx_export.parity.compare import run_reference
    from cifarx_serve.devices import Device
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from cifarx_train.pytorch_backend import PyTorchBackend
    from tests.support.conversion import write_artifact

    with PyTorchBackend(checkpoint, Device("cpu")) as backend:
        logits = torch.from_numpy(run_reference(backend, parity_images).logits)
    mean, spread = logits.mean(dim=0), logits.std(dim=0) / 2
    loaded = load_checkpoint(checkpoint)
    weights = {key: value.clone() for key, value in loaded.weights.items()}
    weights["model.8.weight"] /= spread[:, None]
    weights["model.8.bias"] = (weights["model.8.bias"] - mean) / spread
    path = tmp_path_factory.mktemp("decided") / "lzh_0.pth"
    save_checkpoint(path, loaded._replace(weights=weights))
    write_artifact(path, "onnx", path.with_suffix(".onnx"))
    return path


@pytest.fixture(scope="session")
def image_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small images with the class names of `checkpoint`, enough for a parity check."""
    from cifarx_train.checkpoints.checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("data") / "pictures"
    write_image_folder(folder, load_checkpoint(checkpoint).spec.class_names)
    return folder


@pytest.fixture(scope="session")
def small_image_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ten images fewer than a parity check needs."""
    folder = tmp_path_factory.mktemp("data") / "few"
    shutil.copytree(image_folder, folder)
    for class_folder in folder.glob("test/*"):
        for image in sorted(class_folder.iterdir())[99:]:
            image.unlink()
    return folder


@pytest.fixture(scope="session")
def few_images(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 30 test images and 10 training images."""
    from cifarx_train.checkpoints.checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("data") / "forty"
    write_image_folder(folder, load_checkpoint(checkpoint).spec.class_names, images=3)
    return folder


@pytest.fixture(scope="session")
def relabeled_image_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the images of `image_folder` with other class names."""
    folder = tmp_path_factory.mktemp("data") / "other"
    shutil.copytree(image_folder, folder)
    for class_folder in sorted(folder.glob("*/*")):
        class_folder.rename(class_folder.with_name(f"other {class_folder.name}"))
    return folder


def write_image_folder(folder: Path, class_names: Sequence[str], images: int = IMAGES_PER_CLASS) -> None:
    """Write one training image and `images` test images per class: noise over a color."""
    random = np.random.default_rng(0)
    for name in class_names:
        for split, count in (("train", 1), ("test", images)):
            class_folder = folder / split / name
            class_folder.mkdir(parents=True)
            pixels = random.integers(0, 256, (count, 1, 1, 3)) * 0.7 + random.integers(0, 77, (count, 8, 8, 3))
            for number, image in enumerate(pixels.astype(np.uint8)):
                Image.fromarray(image).save(class_folder / f"{number:04}.png")
