"""The table of formats: every row leads to a converter, and to a backend that opens what it makes."""

from importlib import import_module
from pathlib import Path

import pytest

from cifarx_export.formats import FORMATS, ExportOptions, export_format
from cifarx_serve.backends.registry import backend_for
from cifarx_serve.errors import UsageError


@pytest.mark.parametrize("name", FORMATS)
def test_the_backend_of_a_format_opens_its_files(name: str) -> None:
    kind = export_format(name)
    assert backend_for(Path(f"lzh_9{kind.suffix}")).name == kind.backend


@pytest.mark.parametrize("name", FORMATS)
def test_the_converter_of_a_format_is_there(name: str) -> None:
    module, _, function = FORMATS[name].converter.partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_honours_only_options_that_there_are(name: str) -> None:
    assert FORMATS[name].options <= set(ExportOptions._fields)


def test_suffixes_are_the_documented_ones() -> None:
    assert {name: kind.suffix for name, kind in FORMATS.items() if name in {"onnx", "torchscript"}} == {
        "onnx": ".onnx",
        "torchscript": ".torchscript.pt",
    }


def test_no_two_formats_write_the_same_file() -> None:
    suffixes = [kind.suffix for kind in FORMATS.values()]
    assert len(set(suffixes)) == len(suffixes)


def test_torchscript_is_legacy_and_onnx_is_not() -> None:
    assert export_format("torchscript").legacy
    assert not export_format("onnx").legacy


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
