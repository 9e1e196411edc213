"""A backend whose failures are planted: in files beside the model's, and in the colours of images."""

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.backends import registry
from cifarx_serve.backends.base import Backend
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec
from tests.support.color_model import SPEC

POISON = (1, 2, 3)
"""The colour of an image on which the model does not run."""

BOMB = (3, 2, 1)
"""The colour of an image on which its library fails in a way of its own."""


class PlantedBackend(Backend):
    """The logits are ten times the mean red, green and blue, as of `color_model`.

    The file is a spec. While `FILE.failing` is there it runs on nothing; while `FILE.slow` is there it does not end.
    """

    name = "planted"
    suffixes = (".planted",)
    opened = 0
    """Of those that are not closed."""

    def __init__(self, path: Path, device: Device) -> None:
        del device
        self.spec, self.provider = self.read_spec(path), "none"
        self._path = path
        PlantedBackend.opened += 1

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        return ModelSpec.from_json(path.read_bytes(), str(path))

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        while self._path.with_suffix(".slow").exists():
            time.sleep(0.002)
        if self._path.with_suffix(".failing").exists():
            raise ModelFileError(f"{self._path} does not run", "export it again")
        pixels = batch.mean((1, 2)) if self.spec.embedded_preprocessing else batch.mean((2, 3)) * 255
        for colour in np.rint(pixels).astype(int).tolist():
            if tuple(colour) == POISON:
                raise ModelFileError(f"{self._path} does not run on this", "export it again")
            if tuple(colour) == BOMB:
                raise RuntimeError("the library fails")
        return np.asarray(pixels / 25.5, np.float32)

    def close(self) -> None:
        PlantedBackend.opened -= 1


def write_planted(path: Path, model: str = "colours", embedded: bool = False) -> Path:
    """A file that the backend opens; `model` is what its versions differ in."""
    spec = msgspec.structs.replace(SPEC, model=model, embedded_preprocessing=embedded)
    path.write_text(spec.to_json())
    return path


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the backend known until the test's end."""
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    registry.register_backend("planted", "tests.support.planted_backend:PlantedBackend", PlantedBackend.suffixes)
    monkeypatch.setattr(PlantedBackend, "opened", 0)
