from collections.abc import Callable

import pytest

from cifarx_export.formats.int8.refused import skip_refused
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.progress import silent


def attempt(result: str | Exception) -> Callable[[], str]:
    def run() -> str:
        if isinstance(result, Exception):
            raise result
        return result

    return run


def test_refused_candidates_are_skipped_with_their_reason() -> None:
    lines: list[str] = []
    attempts = [
        attempt(UsageError("no kernel", "use onnx")),
        attempt("a"),
        attempt(UsageError("damaged", "")),
        attempt("b"),
    ]
    assert list(skip_refused(attempts, UsageError, lines.append)) == ["a", "b"]
    assert lines == ["int8: no kernel", "int8: damaged"]


def test_the_last_refusal_is_raised_if_all_are_refused() -> None:
    attempts = [attempt(UsageError("first", "")), attempt(UsageError("second", ""))]
    with pytest.raises(UsageError, match="second"):
        list(skip_refused(attempts, UsageError, silent))


def test_other_errors_are_raised_at_once() -> None:
    with pytest.raises(DataError, match="no images"):
        list(skip_refused([attempt(DataError("no images", "")), attempt("a")], UsageError, silent))


def test_later_attempts_wait_until_their_result_is_asked_for() -> None:
    results = skip_refused([attempt("a"), attempt(AssertionError("too early"))], UsageError, silent)
    assert next(results) == "a"
