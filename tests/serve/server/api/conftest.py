"""Model files for the tests of the API."""

from pathlib import Path

import pytest

from tests.support.color_model import write_onnx
from tests.support.faulty_backend import register_faulty_backend, write_faulty_model


@pytest.fixture
def color_model(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


@pytest.fixture
def faulty_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_faulty_backend(monkeypatch)
    return write_faulty_model(tmp_path / "faulty.faulty")
