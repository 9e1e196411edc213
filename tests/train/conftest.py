"""Fixtures for the tests of the training package: a small dataset of image files and a checkpoint trained on it."""

from pathlib import Path

import pytest

from tests.support.image_datasets import write_image_folder


@pytest.fixture(scope="session")
def color_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only dataset of 60 training and 30 test images of three classes, 32x32."""
    return write_image_folder(tmp_path_factory.mktemp("drawn") / "colors")


@pytest.fixture(scope="session")
def trained_checkpoint(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only checkpoint of a training run on that dataset."""
    from cifarx_train.train import train

    done = train("lzh", data=str(color_folder), epochs=1, device="cpu", out=tmp_path_factory.mktemp("run"))
    return done.checkpoints[0]
