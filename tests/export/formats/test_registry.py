"""Every row of the registry has a converter, a backend that opens its artifacts, and a line in the documentation."""

import shutil
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from cifarx_export.formats.registry import (
    FORMATS,
    NO_OPTIONS,
    OPSETS,
    PRECISIONS,
    ConversionSource,
    ExportOptions,
    get_format,
    require_supported,
    require_weights_fit,
)
from cifarx_export.formats.triton.converter import MODEL_PATH
from cifarx_serve.backends.registry import WEB_MODEL, backend_class, backend_for, model_file
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec, Precision
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from tests.support.conversion import conversion_source
from tests.support.installed_formats import format_parameter

VALUES: dict[str, Any] = {"opset": 20, "calibration_images": 64, "embed_preprocessing": True}
"""Each option with a value."""


def choices() -> Iterator[tuple[str, str, ExportOptions]]:
    """Yield every format in every precision, without options and with each option."""
    for name, precision in product(FORMATS, PRECISIONS):
        yield name, precision, NO_OPTIONS
        for option, value in VALUES.items():
            yield name, precision, NO_OPTIONS._replace(**{option: value})


def supported(name: str, precision: str, options: ExportOptions) -> bool:
    """Return whether the rows support a choice."""
    row = FORMATS[name]
    given = {option for option, value in options._asdict().items() if value is not None}
    calibrated = precision == "int8" or "calibration_images" not in given
    return precision in row.precisions and given <= set(row.options) and calibrated


SUPPORTED = [choice for choice in choices() if supported(*choice)]
UNSUPPORTED = [choice for choice in choices() if not supported(*choice)]


def label(value: object) -> str:
    if isinstance(value, ExportOptions):
        return "+".join(option for option, given in value._asdict().items() if given is not None) or "plain"
    return str(value)


def test_every_option_has_a_value_in_these_tests() -> None:
    assert set(VALUES) == set(ExportOptions._fields)


@pytest.mark.parametrize("name", FORMATS)
def test_the_backend_of_a_format_opens_its_artifacts(name: str) -> None:
    row = get_format(name)
    for precision in row.precisions:
        path = Path(row.file_name("lzh_9", precision))
        model = path / {".triton": f"lzh_9/{MODEL_PATH}", ".web": WEB_MODEL}.get(row.directory_suffix or "", "")
        assert backend_for(model).name == row.backend


@pytest.mark.parametrize("name", FORMATS)
def test_the_converter_of_a_format_exists(name: str) -> None:
    module, _, function = FORMATS[name].converter.partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_only_known_options_precisions_and_devices(name: str) -> None:
    row = FORMATS[name]
    assert set(row.options) <= set(ExportOptions._fields)
    assert {"fp32"} <= set(row.precisions) <= set(PRECISIONS)
    assert {"cpu"} <= set(row.devices) <= {"cpu", "cuda", "tensorrt", "mps", "gpu", "npu"}


def test_precisions_match_the_spec() -> None:
    assert get_args(Precision) == PRECISIONS


def test_suffixes_of_all_formats() -> None:
    assert {name: row.suffix for name, row in FORMATS.items()} == {
        "onnx": ".onnx",
        "torchscript": ".torchscript.pt",
        "pt2": ".pt2",
        "aotinductor": ".aoti.pt2",
        "openvino": ".openvino.zip",
        "executorch": ".pte",
        "litert": ".tflite",
        "triton": ".triton",
        "web": ".web",
    }


def test_file_names_are_unique() -> None:
    names = [
        FORMATS[name].file_name("lzh_9", precision, embedded)
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
def test_file_names_state_the_precision_and_embedded_preprocessing(
    precision: Precision, embedded: bool, name: str
) -> None:
    assert get_format("onnx").file_name("lzh_9", precision, embedded) == name


def test_torchscript_is_legacy_and_onnx_is_not() -> None:
    assert get_format("torchscript").legacy
    assert not get_format("onnx").legacy


# Supported and unsupported choices.


@pytest.mark.parametrize(("name", "precision", "options"), SUPPORTED, ids=label)
def test_supported_choices_are_accepted(name: str, precision: str, options: ExportOptions) -> None:
    require_supported(name, precision, options)


@pytest.mark.parametrize(("name", "precision", "options"), UNSUPPORTED, ids=label)
def test_unsupported_choices_are_refused_with_the_alternatives(
    name: str, precision: str, options: ExportOptions
) -> None:
    with pytest.raises(UsageError) as raised:
        require_supported(name, precision, options)
    row, remedy = FORMATS[name], raised.value.remedy
    assert "\n" not in str(raised.value)
    if precision not in row.precisions:
        alternatives = [other for other in FORMATS if precision in FORMATS[other].precisions]
        assert raised.value.problem == f"format {name} does not support {precision}"
        assert all(known in remedy for known in row.precisions)
    elif any(option not in row.options for option, value in options._asdict().items() if value is not None):
        option = next(option for option, value in options._asdict().items() if value is not None)
        alternatives = [other for other in FORMATS if option in FORMATS[other].options]
        assert raised.value.problem == f"format {name} does not support --{option.replace('_', '-')}"
    else:
        alternatives = ["int8"]
        assert raised.value.problem == f"{precision} needs no calibration"
    assert alternatives
    assert all(other in remedy for other in alternatives)


@pytest.mark.parametrize("opset", [-1, 0, 10, 24, 99])
def test_an_unsupported_opset_is_refused(opset: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset} is not supported: give {OPSETS[0]} to {OPSETS[-1]}"):
        require_supported("onnx", "fp32", ExportOptions(opset=opset))


@pytest.mark.parametrize(
    ("name", "opset", "precision", "options", "message"),
    [
        ("onnx", 12, "int8", NO_OPTIONS, "int8 needs opset 13, not 12: give --opset 13 to 23"),
        ("openvino", 12, "bf16", NO_OPTIONS, "bf16 needs opset 13, not 12: give --opset 13 to 23"),
        (
            "onnx",
            17,
            "fp32",
            ExportOptions(embed_preprocessing=True),
            "--embed-preprocessing needs opset 18, not 17: give ",
        ),
    ],
)
def test_what_needs_a_newer_opset_is_refused(
    name: str, opset: int, precision: str, options: ExportOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        require_supported(name, precision, options._replace(opset=opset))
    require_supported(name, precision, NO_OPTIONS._replace(opset=opset + 1, **_given(options)))


def _given(options: ExportOptions) -> dict[str, Any]:
    return {option: value for option, value in options._asdict().items() if value is not None}


@pytest.mark.parametrize("typed", ["fp8", "FP32", "float16", ""])
def test_an_unknown_precision_is_refused_with_all_precisions(typed: str) -> None:
    with pytest.raises(UsageError, match="unknown precision") as raised:
        require_supported("onnx", typed, NO_OPTIONS)
    assert any(precision in raised.value.remedy for precision in PRECISIONS)


@pytest.mark.parametrize(("typed", "meant"), [("onxx", "onnx"), ("ONNX", "onnx"), ("torch-script", "torchscript")])
def test_a_misspelled_format_is_refused_with_the_closest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"unknown format '{typed}': did you mean '{meant}'"):
        get_format(typed)


def test_an_unknown_format_is_refused_with_all_formats() -> None:
    with pytest.raises(UsageError) as raised:
        get_format("zip")
    assert "did you mean" not in str(raised.value)
    for name in FORMATS:
        assert name in raised.value.remedy


# Sizes of weights.


@pytest.mark.parametrize("name", ["onnx", "triton"])
def test_weights_that_do_not_fit_are_refused_with_the_alternatives(name: str) -> None:
    limit = FORMATS[name].max_weight_bytes
    assert limit is not None
    require_weights_fit(name, limit)
    message = f"^the weights have 2.58 GB, and {name} files hold at most 2.13 GB: use --format torchscript or pt2 or "
    with pytest.raises(UsageError, match=message):
        require_weights_fit(name, 2_580_000_000)


@pytest.mark.parametrize("name", ["torchscript", "pt2"])
def test_archives_of_pytorch_hold_any_weights(name: str) -> None:
    require_weights_fit(name, 10**12)


# Inputs.


def source_with_images(images: np.ndarray | None) -> ConversionSource:
    spec = ModelSpec(model="x", class_names=("a", "b"), input=InputSpec(height=2, width=3, layout="NHWC"))
    return ConversionSource(nn.Identity, spec, NO_OPTIONS, lambda count: pytest.fail(str(count)), silent, None, images)


def test_the_example_is_a_batch_of_two_in_the_layout_of_the_network() -> None:
    source = source_with_images(None)
    assert source.example_input().shape == (2, 2, 3, 3)
    assert torch.equal(source.example_input(), source.example_input())


@pytest.mark.parametrize(("images", "count", "used"), [(200, 100, 100), (150, 100, 75), (70, 100, 70)])
def test_test_inputs_are_spread_over_the_images(images: int, count: int, used: int) -> None:
    pixels = np.arange(images, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    edges, *batches = source_with_images(pixels).test_inputs(count)
    assert edges[:, 0, 0, 0].tolist() == [0, 1]  # black and white
    levels = np.concatenate(batches)[:, 0, 0, 0] * 255
    assert max(map(len, batches)) <= 64
    assert len(levels) == used
    assert levels[-1] >= images - 2


def test_without_images_the_test_inputs_are_black_and_white() -> None:
    assert [batch.shape for batch in source_with_images(None).test_inputs(10)] == [(2, 2, 3, 3)]


def test_the_documented_table_matches_the_rows() -> None:
    """`benchmarks/format_table.py` writes the page."""
    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    documented = {row[0]: row[1:] for row in rows if len(row) == 6}
    assert list(documented)[2:] == list(FORMATS)
    for name, row in FORMATS.items():
        file, precisions, devices, options, backend = documented[name]
        assert file == f"`NAME{row.suffix}{'/' if row.directory_suffix else ''}`"
        assert precisions.split(", ") == list(row.precisions)
        assert devices.split(", ") == list(row.devices)
        assert [flag.strip("`-").replace("-", "_") for flag in options.split(", ") if flag] == list(row.options)
        assert backend == row.backend


# Every supported choice converts, and the backend of the row runs it.


DISTINCT = [
    choice
    for choice in SUPPORTED
    if (choice[0] not in ("triton", "web") or choice[2] == NO_OPTIONS) and choice[:2] != ("aotinductor", "fp32")
]
"""The supported choices without the options of Triton and the web, whose models are those of the ONNX row.

Compiling takes long, and the tests of AOTInductor compile the same checkpoint in fp32.
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "options"),
    [format_parameter(*choice, id="-".join(map(label, choice))) for choice in DISTINCT],
)
def test_every_supported_choice_converts_and_runs(
    name: str, precision: Precision, options: ExportOptions, checkpoint: Path, parity_images: Any
) -> None:
    row, loaded = FORMATS[name], load_checkpoint(checkpoint)
    source = conversion_source(loaded, precision, options)
    artifact = next(iter(row.convert(source)))
    path = Path(row.file_name("lzh_9", precision, bool(options.embed_preprocessing)))
    if row.directory_suffix:
        path.mkdir()
    spec = artifact.complete_spec(source.spec)
    artifact.save(path, spec)
    with backend_class(row.backend)(model_file(path), Device("cpu")) as backend:
        assert backend.spec == spec
        assert spec.precision == precision
        assert spec.embedded_preprocessing == (bool(options.embed_preprocessing) or name == "web")
        for size in (1, 5):
            logits = backend.run(model_input(parity_images.images[:size], spec))
            assert (logits.shape, logits.dtype.name) == ((size, len(spec.class_names)), "float32")
    assert [entry.name for entry in Path.cwd().iterdir()] == [path.name]
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
