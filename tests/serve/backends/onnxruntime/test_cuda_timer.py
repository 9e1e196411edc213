"""These tests use a fake CUDA runtime library that records its calls, and the real one if it is installed."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.backends.onnxruntime.cuda_timer import CudaTimer, open_cuda_timer
from cifarx_serve.errors import DeviceError


class FakeRuntime:
    """Records all calls, returns addresses for created objects, and fails in the call named `fails`."""

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


def test_the_work_is_between_two_events_on_the_timers_stream() -> None:
    runtime = FakeRuntime()
    timer = CudaTimer(runtime, 3)
    opened = [name for name, _ in runtime.calls]
    assert opened == ["cudaSetDevice", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventCreate"]
    assert runtime.calls[0][1] == (3,)
    assert runtime.calls[1][1] == (timer.stream, 1)
    first, second = (arguments[0] for _, arguments in runtime.calls[2:])
    runtime.calls.clear()
    assert timer.time(lambda: runtime.calls.append(("work", ()))) == pytest.approx(250)
    assert [(name, arguments) for name, arguments in runtime.calls if name != "cudaEventElapsedTime"] == [
        ("cudaEventRecord", (first, timer.stream)),
        ("work", ()),
        ("cudaEventRecord", (second, timer.stream)),
        ("cudaEventSynchronize", (second,)),
    ]
    assert runtime.calls[-1][1][1:] == (first, second)


def test_closing_destroys_the_events_and_the_stream() -> None:
    runtime = FakeRuntime()
    timer = CudaTimer(runtime, 0)
    runtime.calls.clear()
    timer.close()
    assert [name for name, _ in runtime.calls] == ["cudaEventDestroy", "cudaEventDestroy", "cudaStreamDestroy"]
    assert runtime.calls[-1][1] == (timer.stream,)


@pytest.mark.parametrize("name", ["cudaSetDevice", "cudaStreamCreateWithFlags", "cudaEventCreate"])
def test_a_failed_call_is_reported_with_its_reason(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"{name} failed \(error 35\)"):
        CudaTimer(FakeRuntime(fails=name), 0)


def test_failed_work_raises() -> None:
    timer = CudaTimer(FakeRuntime(fails="cudaEventSynchronize"), 0)
    with pytest.raises(DeviceError, match="cudaEventSynchronize"):
        timer.time(lambda: None)


def test_no_timer_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        assert "cudart" in name
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_libraries, "preload", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert open_cuda_timer(0) is None


def test_the_timer_uses_the_library_that_the_provider_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> FakeRuntime:
        loaded.append(name)
        return FakeRuntime()

    monkeypatch.setattr(cuda_libraries, "preload", lambda: None)
    monkeypatch.setattr(cuda_libraries, "cuda_major_version", lambda: "13")
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert isinstance(open_cuda_timer(0), CudaTimer)
    assert loaded[0] in ("libcudart.so.13", "cudart64_13.dll")


def test_on_this_machine() -> None:
    """The library is missing, the device is not available, or the time is valid."""
    try:
        timer = open_cuda_timer(0)
    except DeviceError as error:
        assert "cudaSetDevice failed" in error.problem
    else:
        if timer is not None:
            assert 0 <= timer.time(lambda: None) < 1e6
            timer.close()
