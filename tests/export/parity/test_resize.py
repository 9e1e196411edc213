"""Whether the resize inside a file is Pillow's: real files, with the right filter and with others."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from cifarx_export.formats.registry import ExportOptions, export_format
from cifarx_export.parity.resize import check_resize
from cifarx_serve.backends.registry import open_backend
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from tests.support.conversion_source import source_of
from tests.support.onnx_faults import edited, frozen_batch

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


def embedded(checkpoint: Path, inside: str, said: str) -> Path:
    """A file that resizes by one filter and says another."""
    source = source_of(load_checkpoint(checkpoint), options=ExportOptions(embed_preprocessing=True))

    def with_filter(name: str) -> msgspec.Struct:
        return msgspec.structs.replace(source.spec, input=msgspec.structs.replace(source.spec.input, resize=name))

    artifact = export_format("onnx").convert(source._replace(spec=with_filter(inside)))
    path = Path("embedded.onnx").absolute()
    artifact.save(path, artifact.describe(with_filter(said)))
    return path


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_is_pillows(name: str, decided: Path) -> None:
    with open_backend(embedded(decided, name, name), device="cpu") as backend:
        [check] = check_resize(backend, IMAGES)
    assert check.name == "resize"
    assert check.passed, check
    assert "70 images 1.5 and 3 times as large" in check.found


@pytest.mark.parametrize("inside", FILTERS)
def test_another_filter_inside_is_found(inside: str, decided: Path) -> None:
    said = FILTERS[FILTERS.index(inside) - 1]
    with open_backend(embedded(decided, inside, said), device="cpu") as backend:
        [check] = check_resize(backend, IMAGES)
    assert not check.passed, check


def test_what_does_not_run_has_not_passed(decided: Path) -> None:
    path = embedded(decided, "bilinear", "bilinear")
    with open_backend(edited(path, [frozen_batch(2)]), device="cpu") as backend:
        [check] = check_resize(backend, IMAGES)
    assert not check.passed
    assert "does not run" in check.found


def test_a_file_without_a_resize_has_no_such_check(good_onnx: Path) -> None:
    with open_backend(good_onnx, device="cpu") as backend:
        assert check_resize(backend, IMAGES) == []
