"""A backend with fault injection: it fails or blocks while certain files exist, and on images of certain colors."""

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_serve.backends import registry
from cifarx_serve.backends.base import Backend
from cifarx_serve.devices import Device, out_of_memory_error
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec
from tests.support.color_model import SPEC

POISON = (1, 2, 3)
"""The color of an image on which the backend raises ModelFileError."""

BOMB = (3, 2, 1)
"""The color of an image on which the backend raises an error of its library."""

LARGE = (2, 3, 1)
"""The color of an image for which the backend has not enough memory."""


class FaultyBackend(Backend):
    """The logits are ten times the mean red, green and blue, as for `color_model`.

    The model file is a spec. While `FILE.failing` exists, the backend fails on every batch. While `FILE.slow` exists,
    it blocks in a batch, and when it opens a model named "endless".
    """

    name = "faulty"
    suffixes = (".faulty",)
    open_count = 0
    """The number of backends that are open."""

    def __init__(self, path: Path, device: Device) -> None:
        del device
        self.spec, self.provider = self.read_spec(path), "none"
        self._path = path
        if self.spec.model == "endless":
            self._wait()
        FaultyBackend.open_count += 1

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        return ModelSpec.from_json(path.read_bytes(), str(path))

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        self._wait()
        if self._path.with_suffix(".failing").exists():
            raise ModelFileError(f"{self._path} cannot run", "export it again")
        pixels = batch.mean((1, 2)) if self.spec.embedded_preprocessing else batch.mean((2, 3)) * 255
        for color in np.rint(pixels).astype(int).tolist():
            if tuple(color) == POISON:
                raise ModelFileError(f"{self._path} cannot run on this image", "export it again")
            if tuple(color) == BOMB:
                raise RuntimeError("an error of the library")
            if tuple(color) == LARGE:
                raise out_of_memory_error("cuda:0", len(batch), 3 << 20)
        return np.asarray(pixels / 25.5, np.float32)

    def _wait(self) -> None:
        while self._path.with_suffix(".slow").exists():
            time.sleep(0.002)

    def close(self) -> None:
        FaultyBackend.open_count -= 1


def write_faulty_model(path: Path, model: str = "colors", embedded: bool = False) -> Path:
    """Write a file for the backend; files of one `model` are the same version."""
    spec = msgspec.structs.replace(SPEC, model=model, embedded_preprocessing=embedded)
    path.write_text(spec.to_json())
    return path


def register_faulty_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the backend until the end of the test."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register_backend("faulty", "tests.support.faulty_backend:FaultyBackend", FaultyBackend.suffixes)
    monkeypatch.setattr(FaultyBackend, "open_count", 0)
