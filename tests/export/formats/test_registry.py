"""The table of formats: every row leads to a converter, to a backend that opens what it makes, and to the help."""

import shutil
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest

from cifarx_export.formats.registry import (
    FORMATS,
    NO_OPTIONS,
    OPSETS,
    PRECISIONS,
    ExportOptions,
    export_format,
    require_supported,
)
from cifarx_serve.backends.registry import backend_class, backend_for
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.spec import Precision
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from tests.support.conversion_source import source_of

VALUES: dict[str, Any] = {"opset": 20, "calibration_images": 64, "embed_preprocessing": True}
"""An option and something to give it."""


def choices() -> Iterator[tuple[str, str, ExportOptions]]:
    """Every format in every precision, without an option and with each."""
    for name, precision in product(FORMATS, PRECISIONS):
        yield name, precision, NO_OPTIONS
        for option, value in VALUES.items():
            yield name, precision, NO_OPTIONS._replace(**{option: value})


def supported(name: str, precision: str, options: ExportOptions) -> bool:
    """By the table alone."""
    row = FORMATS[name]
    given = {option for option, value in options._asdict().items() if value is not None}
    calibrated = precision == "int8" or "calibration_images" not in given
    return precision in row.precisions and given <= set(row.options) and calibrated


ALL = list(choices())
GOOD = [choice for choice in ALL if supported(*choice)]
BAD = [choice for choice in ALL if not supported(*choice)]


def label(value: object) -> str:
    if isinstance(value, ExportOptions):
        return "+".join(option for option, given in value._asdict().items() if given is not None) or "plain"
    return str(value)


def test_every_option_has_a_value_here() -> None:
    assert set(VALUES) == set(ExportOptions._fields)


@pytest.mark.parametrize("name", FORMATS)
def test_the_backend_of_a_format_opens_its_files(name: str) -> None:
    kind = export_format(name)
    for precision in kind.precisions:
        path = Path(kind.file_name("lzh_9", precision))
        opened = path / kind.model.replace("*", "lzh_9") if kind.model else path
        assert backend_for(opened).name == kind.backend


@pytest.mark.parametrize("name", FORMATS)
def test_the_converter_of_a_format_is_there(name: str) -> None:
    module, _, function = FORMATS[name].converter.partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_nothing_that_there_is_not(name: str) -> None:
    row = FORMATS[name]
    assert set(row.options) <= set(ExportOptions._fields)
    assert {"fp32"} <= set(row.precisions) <= set(PRECISIONS)
    assert {"cpu"} <= set(row.devices) <= {"cpu", "cuda", "tensorrt", "mps"}


def test_precisions_are_those_of_the_spec() -> None:
    assert get_args(Precision) == PRECISIONS


def test_suffixes_are_the_documented_ones() -> None:
    assert {name: kind.suffix for name, kind in FORMATS.items() if name in {"onnx", "torchscript"}} == {
        "onnx": ".onnx",
        "torchscript": ".torchscript.pt",
    }


def test_no_two_choices_write_the_same_file() -> None:
    names = [
        FORMATS[name].file_name("lzh_9", precision, embedded)  # type: ignore[arg-type]
        for name, precision, embedded in product(FORMATS, PRECISIONS, [False, True])
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("precision", "embedded", "name"),
    [
        ("fp32", False, "lzh_9.onnx"),
        ("fp16", False, "lzh_9.fp16.onnx"),
        ("int8", False, "lzh_9.int8.onnx"),
        ("fp32", True, "lzh_9.embedded.onnx"),
        ("fp16", True, "lzh_9.embedded.fp16.onnx"),
    ],
)
def test_names_say_what_is_inside(precision: Precision, embedded: bool, name: str) -> None:
    assert export_format("onnx").file_name("lzh_9", precision, embedded) == name


def test_torchscript_is_legacy_and_onnx_is_not() -> None:
    assert export_format("torchscript").legacy
    assert not export_format("onnx").legacy


# What is refused.


@pytest.mark.parametrize(("name", "precision", "options"), GOOD, ids=label)
def test_what_the_table_has_is_supported(name: str, precision: str, options: ExportOptions) -> None:
    require_supported(name, precision, options)


@pytest.mark.parametrize(("name", "precision", "options"), BAD, ids=label)
def test_what_the_table_has_not_is_refused_with_what_can(name: str, precision: str, options: ExportOptions) -> None:
    with pytest.raises(UsageError) as caught:
        require_supported(name, precision, options)
    row, remedy = FORMATS[name], caught.value.remedy
    assert "\n" not in str(caught.value)
    if precision not in row.precisions:
        able = [other for other in FORMATS if precision in FORMATS[other].precisions]
        assert f"format {name} has no {precision}" in caught.value.problem
        assert all(known in remedy for known in row.precisions)
    elif any(option not in row.options for option, value in options._asdict().items() if value is not None):
        option = next(option for option, value in options._asdict().items() if value is not None)
        able = [other for other in FORMATS if option in FORMATS[other].options]
        assert f"format {name} has no --{option.replace('_', '-')}" in caught.value.problem
    else:
        able = ["int8"]
        assert f"{precision} is not calibrated" in caught.value.problem
    assert able
    assert all(other in remedy for other in able)


@pytest.mark.parametrize("opset", [-1, 0, 17, 24, 99])
def test_an_opset_that_is_not_supported_is_refused(opset: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset} is not supported: give {OPSETS[0]} to {OPSETS[-1]}"):
        require_supported("onnx", "fp32", ExportOptions(opset=opset))


@pytest.mark.parametrize("typed", ["fp8", "FP32", "float16", ""])
def test_a_precision_that_is_none_is_answered_with_all(typed: str) -> None:
    with pytest.raises(UsageError, match="unknown precision") as caught:
        require_supported("onnx", typed, NO_OPTIONS)
    assert any(precision in caught.value.remedy for precision in PRECISIONS)


@pytest.mark.parametrize(("typed", "meant"), [("onxx", "onnx"), ("ONNX", "onnx"), ("torch-script", "torchscript")])
def test_a_misspelt_format_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"unknown format '{typed}': did you mean '{meant}'"):
        export_format(typed)


def test_a_format_like_none_is_answered_with_all() -> None:
    with pytest.raises(UsageError) as caught:
        export_format("zip")
    assert "did you mean" not in str(caught.value)
    for name in FORMATS:
        assert name in caught.value.remedy


def test_the_documented_table_is_this_one() -> None:
    """`benchmarks/format_table.py` writes the page."""
    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    documented = {row[0]: row[1:] for row in rows if len(row) == 6}
    assert list(documented)[2:] == list(FORMATS)
    for name, kind in FORMATS.items():
        file, precisions, devices, options, backend = documented[name]
        assert file == f"`NAME{kind.suffix}{'/' if kind.model else ''}`"
        assert precisions.split(", ") == list(kind.precisions)
        assert devices.split(", ") == list(kind.devices)
        assert [flag.strip("`-").replace("-", "_") for flag in options.split(", ") if flag] == list(kind.options)
        assert backend == kind.backend


# What is not refused converts, and the row's backend runs it.


CONVERTED = [choice for choice in GOOD if choice[0] != "triton" or choice[2] == NO_OPTIONS]
"""What is in a Triton repository is the ONNX row's model."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision", "options"), CONVERTED, ids=label)
def test_what_is_supported_converts_and_runs(
    name: str, precision: Precision, options: ExportOptions, checkpoint: Path, parity_images: Any
) -> None:
    kind, loaded = FORMATS[name], load_checkpoint(checkpoint)
    source = source_of(loaded, precision, options)
    artifact = kind.convert(source)
    path = Path(kind.file_name("lzh_9", precision, bool(options.embed_preprocessing)))
    if kind.model:
        path.mkdir()
    spec = artifact.describe(source.spec)
    artifact.save(path, spec)
    with backend_class(kind.backend)(kind.model_file(path), Device("cpu")) as backend:
        assert backend.spec == spec
        assert spec.precision == precision
        assert spec.embedded_preprocessing == bool(options.embed_preprocessing)
        for size in (1, 5):
            logits = backend.run(model_input(parity_images.images[:size], spec))
            assert (logits.shape, logits.dtype.name) == ((size, len(spec.class_names)), "float32")
    assert [entry.name for entry in Path.cwd().iterdir()] == [path.name]
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
