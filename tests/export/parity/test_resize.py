"""The resize inside a file must be Pillow's: real files, with the right filter and with others."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.registry import ExportOptions
from cifarx_export.parity.resize import check_resize
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from tests.support.conversion import conversion_source
from tests.support.onnx_faults import edited, frozen_batch

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


def embedded(checkpoint: Path, actual: str, stated: str) -> Path:
    """Return a file that resizes with one filter while its spec states another."""
    source = conversion_source(load_checkpoint(checkpoint), options=ExportOptions(embed_preprocessing=True))

    def with_filter(name: str) -> ModelSpec:
        return msgspec.structs.replace(
            source.spec, input=msgspec.structs.replace(source.spec.input, interpolation=name)
        )

    artifact = next(convert_to_onnx(replace(source, spec=with_filter(actual))))
    path = Path("embedded.onnx").absolute()
    artifact.save(path, artifact.complete_spec(with_filter(stated)))
    return path


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_matches_pillow(name: str, confident_checkpoint: Path) -> None:
    with open_backend(embedded(confident_checkpoint, name, name), device="cpu") as backend:
        [check] = check_resize(backend, IMAGES)
    assert check.name == "resize"
    assert check.passed, check
    assert "70 images enlarged 1.5x and 3x: max |Δ|" in check.found


@pytest.mark.parametrize("actual", FILTERS)
def test_another_filter_is_detected(actual: str, confident_checkpoint: Path) -> None:
    stated = FILTERS[FILTERS.index(actual) - 1]
    with open_backend(embedded(confident_checkpoint, actual, stated), device="cpu") as backend:
        [check] = check_resize(backend, IMAGES)
    assert not check.passed, check


def test_a_file_that_does_not_run_fails(confident_checkpoint: Path) -> None:
    path = embedded(confident_checkpoint, "bilinear", "bilinear")
    with open_backend(edited(path, [frozen_batch(2)]), device="cpu") as backend:
        [check] = check_resize(backend, IMAGES)
    assert not check.passed
    assert "does not run" in check.found


def test_a_file_without_embedded_preprocessing_has_no_check(good_onnx: Path) -> None:
    with open_backend(good_onnx, device="cpu") as backend:
        assert check_resize(backend, IMAGES) == []
