"""Tiny data sets for the tests of the training room, as folders of real image files."""

from pathlib import Path

import pytest

from tests.support.drawn_images import draw_folder


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 30 test images of three classes, 32x32; not to be written to."""
    return draw_folder(tmp_path_factory.mktemp("drawn") / "colours")


@pytest.fixture(scope="session")
def trained_on_colours(drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a real run on those images; not to be written to."""
    from cifarx_train.train import train

    done = train("lzh", data=str(drawn_once), epochs=1, device="cpu", out=tmp_path_factory.mktemp("run"))
    return done.checkpoints[0]
