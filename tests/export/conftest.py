"""The files that the tests of this room start from; tests must not write beside them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

IMAGES_A_CLASS = 101
"""Of ten classes: a thousand images and a few more, so that no batch size divides their number."""


@pytest.fixture(scope="session")
def checkpoint(trained: Any) -> Path:
    """A trained checkpoint."""
    return Path(trained.checkpoint)


@pytest.fixture(scope="session")
def good_onnx(trained: Any) -> Path:
    """The ONNX file of `checkpoint`."""
    return Path(trained.onnx)


@pytest.fixture(scope="session")
def good_torchscript(trained: Any) -> Path:
    """The TorchScript file of `checkpoint`."""
    return Path(trained.torchscript)


@pytest.fixture
def copied(trained: Any, tmp_path: Path) -> Path:
    """A folder of one's own with the checkpoint, its artifacts and their reports."""
    return Path(shutil.copytree(trained.folder, tmp_path / "copied"))


@pytest.fixture(scope="session")
def stale(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the spec of `checkpoint` and the weights of another seed."""
    import torch

    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from cifarx_train.models.registry import network

    loaded = load_checkpoint(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = network(loaded.spec.model).build(len(loaded.spec.class_names))
    path = tmp_path_factory.mktemp("stale") / checkpoint.name
    save_checkpoint(path, loaded._replace(model=other.state_dict()))
    return path


@pytest.fixture(scope="session")
def parity_images(checkpoint: Path) -> Any:
    """Images of the built-in data: more than go through the small batches, and no multiple of any batch size."""
    from cifarx_export.parity.compare import MIN_IMAGES
    from cifarx_export.parity.data import parity_data
    from cifarx_train.checkpoints.checkpoint import load_checkpoint

    whole = parity_data(load_checkpoint(checkpoint).spec, "builtin")
    assert whole.labels is not None
    images = MIN_IMAGES + 3
    return whole._replace(images=whole.images[:images], labels=whole.labels[:images])


@pytest.fixture(scope="session")
def decided(checkpoint: Path, parity_images: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with every class's logits spread alike over the images, its ONNX file beside it.

    However little it has learned: each class is some images' answer, and few answers are close.
    """
    import torch

    from cifarx_export.parity.compare import run_reference
    from cifarx_serve.devices import Device
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from cifarx_train.pytorch_backend import PyTorchBackend
    from tests.support.converted import converted

    with PyTorchBackend(checkpoint, Device("cpu")) as backend:
        logits = torch.from_numpy(run_reference(backend, parity_images).logits)
    mean, spread = logits.mean(dim=0), logits.std(dim=0) / 2
    loaded = load_checkpoint(checkpoint)
    weights = {key: value.clone() for key, value in loaded.model.items()}
    weights["model.8.weight"] /= spread[:, None]
    weights["model.8.bias"] = (weights["model.8.bias"] - mean) / spread
    path = tmp_path_factory.mktemp("decided") / "lzh_0.pth"
    save_checkpoint(path, loaded._replace(model=weights))
    converted(path, "onnx", path.with_suffix(".onnx"))
    return path


@pytest.fixture(scope="session")
def pictures(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small image files, enough for a proof, with the class names of `checkpoint`."""
    from cifarx_train.checkpoints.checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("data") / "pictures"
    draw_pictures(folder, load_checkpoint(checkpoint).spec.class_names)
    return folder


@pytest.fixture(scope="session")
def few_pictures(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images fewer than a proof wants."""
    folder = tmp_path_factory.mktemp("data") / "few"
    shutil.copytree(pictures, folder)
    for place in folder.glob("test/*"):
        for picture in sorted(place.iterdir())[99:]:
            picture.unlink()
    return folder


@pytest.fixture(scope="session")
def other_pictures(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `pictures` with every class under another name."""
    folder = tmp_path_factory.mktemp("data") / "other"
    shutil.copytree(pictures, folder)
    for place in sorted(folder.glob("*/*")):
        place.rename(place.with_name(f"other {place.name}"))
    return folder


def draw_pictures(folder: Path, class_names: Sequence[str], images: int = IMAGES_A_CLASS) -> None:
    """A picture a class for training, and `images` for testing: noise over a colour."""
    random = np.random.default_rng(0)
    for name in class_names:
        for split, count in (("train", 1), ("test", images)):
            place = folder / split / name
            place.mkdir(parents=True)
            pixels = random.integers(0, 256, (count, 1, 1, 3)) * 0.7 + random.integers(0, 77, (count, 8, 8, 3))
            for number, picture in enumerate(pixels.astype(np.uint8)):
                Image.fromarray(picture).save(place / f"{number:04}.png")
