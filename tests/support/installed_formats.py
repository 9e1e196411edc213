"""The formats whose converters are installed. The others have environments of their own, or come from npm."""

from importlib.util import find_spec
from typing import Any, Final

import pytest

from cifarx_export.formats.registry import FORMATS
from tests.support.litert_model import requires_litert_torch
from tests.support.web import requires_web

_MARKS: Final = {
    "executorch": pytest.mark.skipif(find_spec("executorch") is None, reason="no ExecuTorch: make test-executorch"),
    "litert": requires_litert_torch,
    "web": requires_web,
}


def format_parameter(name: str, *values: Any, id: str) -> Any:  # noqa: A002  the name that pytest has
    """Return parameters of a test that is skipped if the converter of a format is not installed."""
    return pytest.param(name, *values, id=id, marks=_MARKS.get(name, ()))


FORMAT_PARAMETERS: Final = [format_parameter(name, id=name) for name in FORMATS]
"""Each format, as the parameter of a test."""
