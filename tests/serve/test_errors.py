import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve import errors
from cifarx_serve.errors import CheckFailed, CifarxError, FallbackWarning, Interrupted, UsageError, unknown

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (FallbackWarning, Interrupted)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_what_is_wrong_and_how_to_mend_it(kind: type[CifarxError]) -> None:
    error = kind("epochs is -1", "give 1 or more")
    assert isinstance(error, CifarxError)
    assert str(error) == "epochs is -1: give 1 or more"
    assert (error.problem, error.remedy) == ("epochs is -1", "give 1 or more")


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_failed_check_is_not_the_users_mistake(kind: type[CifarxError]) -> None:
    assert kind.exit_status == (1 if kind is CheckFailed else 2)


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_an_interruption_ends_as_a_shell_reports_it(number: int, status: int) -> None:
    error = Interrupted("interrupted at step 7", "go on", number)
    assert str(error) == "interrupted at step 7: go on"
    assert error.exit_status == status


def test_a_fallback_is_told_and_stops_nothing() -> None:
    assert issubclass(FallbackWarning, UserWarning)
    assert not issubclass(FallbackWarning, CifarxError)


@pytest.mark.parametrize(
    ("value", "near"),
    [("onnxrt", "onnxruntime"), ("ONNXRUNTIME", "onnxruntime"), ("torch-script", "torchscript"), ("tvm", None)],
)
def test_unknown_names_the_nearest(value: str, near: str | None) -> None:
    error = unknown("backend", value, ["torchscript", "onnxruntime"])
    assert isinstance(error, UsageError)
    assert error.problem == f"unknown backend {value!r}"
    hint = f"did you mean {near!r}? " if near else ""
    assert error.remedy == f"{hint}known are onnxruntime, torchscript"


@given(value=st.text(), choices=st.sets(st.text(min_size=1), min_size=1))
def test_unknown_names_the_value_and_every_choice(value: str, choices: set[str]) -> None:
    error = unknown("model", value, choices)
    assert repr(value) in error.problem
    assert error.remedy.endswith("known are " + ", ".join(sorted(choices)))
