import errno
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve import errors
from cifarx_serve.errors import (
    CheckFailed,
    CifarxError,
    FallbackWarning,
    Interrupted,
    UsageError,
    error_message,
    unknown_name_error,
)

EXCEPTIONS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Exception) and value not in (FallbackWarning, Interrupted)
]


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_every_exception_has_a_problem_and_a_remedy(exception: type[CifarxError]) -> None:
    error = exception("epochs is -1", "give 1 or more")
    assert isinstance(error, CifarxError)
    assert str(error) == "epochs is -1: give 1 or more"
    assert (error.problem, error.remedy) == ("epochs is -1", "give 1 or more")


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_only_a_failed_check_exits_with_1(exception: type[CifarxError]) -> None:
    assert exception.exit_status == (1 if exception is CheckFailed else 2)


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_the_exit_status_of_an_interruption_is_that_of_a_shell(number: int, status: int) -> None:
    error = Interrupted("interrupted at step 7", "resume", number)
    assert str(error) == "interrupted at step 7: resume"
    assert error.exit_status == status


@pytest.mark.parametrize(
    "error", [*(kind("epochs is -1", "give 1 or more") for kind in EXCEPTIONS), Interrupted("a", "b", 2)]
)
def test_a_worker_process_can_return_an_exception(error: CifarxError) -> None:
    returned = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(returned) is type(error)
    assert vars(returned) == vars(error)
    assert (str(returned), repr(returned)) == (str(error), repr(error))


def test_a_fallback_is_a_warning_and_not_an_error() -> None:
    assert issubclass(FallbackWarning, UserWarning)
    assert not issubclass(FallbackWarning, CifarxError)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("one line"), "one line"),
        (
            RuntimeError("\n  CUDA error: invalid argument\nCompile with TORCH_USE_CUDA_DSA"),
            "CUDA error: invalid argument",
        ),
        (MemoryError(), "MemoryError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.onnx"), "No such file or directory"),
        (OSError("libcuda.so.1: cannot open shared object file"), "libcuda.so.1: cannot open shared object file"),
        (OSError(), "OSError"),
    ],
)
def test_the_message_of_any_exception_is_one_line(error: Exception, message: str) -> None:
    assert error_message(error) == message


@pytest.mark.parametrize(
    ("value", "near"),
    [("onnxrt", "onnxruntime"), ("ONNXRUNTIME", "onnxruntime"), ("torch-script", "torchscript"), ("tvm", None)],
)
def test_an_unknown_name_suggests_the_closest_one(value: str, near: str | None) -> None:
    error = unknown_name_error("backend", value, ["torchscript", "onnxruntime"])
    assert isinstance(error, UsageError)
    assert error.problem == f"unknown backend {value!r}"
    hint = f"did you mean {near!r}? " if near else ""
    assert error.remedy == f"{hint}choose from onnxruntime, torchscript"


@given(value=st.text(), choices=st.sets(st.text(min_size=1), min_size=1))
def test_an_unknown_name_is_reported_with_every_choice(value: str, choices: set[str]) -> None:
    error = unknown_name_error("model", value, choices)
    assert repr(value) in error.problem
    assert error.remedy.endswith("choose from " + ", ".join(sorted(choices)))
