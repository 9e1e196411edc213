"""CUDA's runtime library is a list of its calls; on a machine with a GPU also the library itself."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.onnxruntime import cuda_timer
from cifarx_serve.backends.onnxruntime.cuda_timer import CudaClock, open_clock
from cifarx_serve.errors import DeviceError


class Runtime:
    """Notes what is called, gives addresses for what is created, and fails where it is told to."""

    def __init__(self, fails: str = "", milliseconds: float = 0.25) -> None:
        self.calls: list[tuple[str, tuple[int | None, ...]]] = []
        self._fails = fails
        self._milliseconds = milliseconds
        self.cudaGetErrorString = lambda status: f"error {status}".encode()

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == self._fails:
                return 35
            if name in ("cudaStreamCreateWithFlags", "cudaEventCreate"):
                arguments[0]._obj.value = 1000 + len(self.calls)
            elif name == "cudaEventElapsedTime":
                arguments[0]._obj.value = self._milliseconds
            self.calls.append((name, tuple(_value(argument) for argument in arguments)))
            return 0

        return call


def _value(argument: Any) -> int | None:
    found: int | None = getattr(getattr(argument, "_obj", argument), "value", argument)
    return found


def test_the_work_is_between_two_events_on_the_clocks_stream() -> None:
    runtime = Runtime()
    clock = CudaClock(runtime, 3)
    opened = [name for name, _ in runtime.calls]
    assert opened == ["cudaSetDevice", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventCreate"]
    assert runtime.calls[0][1] == (3,)
    assert runtime.calls[1][1] == (clock.stream, 1)
    first, second = (arguments[0] for _, arguments in runtime.calls[2:])
    runtime.calls.clear()
    assert clock.time(lambda: runtime.calls.append(("work", ()))) == pytest.approx(250)
    assert [(name, arguments) for name, arguments in runtime.calls if name != "cudaEventElapsedTime"] == [
        ("cudaEventRecord", (first, clock.stream)),
        ("work", ()),
        ("cudaEventRecord", (second, clock.stream)),
        ("cudaEventSynchronize", (second,)),
    ]
    assert runtime.calls[-1][1][1:] == (first, second)


def test_closing_destroys_what_was_created() -> None:
    runtime = Runtime()
    clock = CudaClock(runtime, 0)
    runtime.calls.clear()
    clock.close()
    assert [name for name, _ in runtime.calls] == ["cudaEventDestroy", "cudaEventDestroy", "cudaStreamDestroy"]
    assert runtime.calls[-1][1] == (clock.stream,)


@pytest.mark.parametrize("name", ["cudaSetDevice", "cudaStreamCreateWithFlags", "cudaEventCreate"])
def test_a_call_that_fails_is_named_with_its_reason(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"{name} failed \(error 35\)"):
        CudaClock(Runtime(fails=name), 0)


def test_work_that_fails_says_so() -> None:
    clock = CudaClock(Runtime(fails="cudaEventSynchronize"), 0)
    with pytest.raises(DeviceError, match="cudaEventSynchronize"):
        clock.time(lambda: None)


def test_no_clock_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        assert "cudart" in name
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_libraries, "preload", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert open_clock(0) is None


def test_a_clock_of_the_library_that_the_provider_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(cuda_libraries, "preload", lambda: None)
    monkeypatch.setattr(cuda_libraries, "cuda_major", lambda: "13")
    monkeypatch.setattr(cuda_timer.ctypes, "CDLL", lambda name: loaded.append(name) or Runtime())
    assert isinstance(open_clock(0), CudaClock)
    assert loaded[0] in ("libcudart.so.13", "cudart64_13.dll")


def test_this_machine() -> None:
    """The library's own answer: none of it, a device that cannot be had, or a time."""
    try:
        clock = open_clock(0)
    except DeviceError as error:
        assert "cudaSetDevice failed" in error.problem
    else:
        if clock is not None:
            assert 0 <= clock.time(lambda: None) < 1e6
            clock.close()
