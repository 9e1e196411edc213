"""Measures the latency of functions in turns, so that their ratios hold even if the speed of the machine drifts."""

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

WINDOW_S: Final = 0.1
"""The length of a window, which is one turn of a function. Its first calls run with cold caches and are not counted."""

PAUSE_S: Final = 0.01
"""The pause between turns. Thread pools spin for some milliseconds after their last call, which slows the next turn."""

WARMUP_CALLS: Final = 10
"""Calls before the first window. They cover allocators, the choice of kernels, and TorchScript's profiling runs."""

WINDOW_WARMUP_CALLS: Final = 3
"""Calls at the start of each window that are not counted; a single one if calls are long."""

STABLE_WINDOWS: Final = 3
"""The number of successive windows that must agree, as in NVIDIA's perf_analyzer."""

STABLE_SPREAD: Final = 0.10
"""The largest relative difference between the medians of windows that agree."""

MAX_DURATION_FACTOR: Final = 3
"""Unstable functions are measured for up to this multiple of the requested time."""

_LONG_CALL_S: Final = 0.02

WindowFunction: TypeAlias = Callable[[], NDArray[np.float64]]
"""Measures one window and returns the time of each counted call in microseconds, at least one."""


class Latency(msgspec.Struct, frozen=True):
    """Wall time of a call in microseconds, over `samples` calls.

    Attributes:
        percentiles: the percentiles from the 0th, which is the minimum, to the 100th.
        spread: the relative difference between the medians of the last windows.
    """

    p50_us: float
    p90_us: float
    p99_us: float
    mean_us: float
    percentiles: tuple[float, ...]
    samples: int
    spread: float

    @property
    def stable(self) -> bool:
        """Whether the last windows agreed."""
        return self.spread <= STABLE_SPREAD


class Runner(NamedTuple):
    """A function to measure: `call` returns when its result is in host memory, so that copies are included."""

    name: str
    call: Callable[[], object]


def measure(runners: Sequence[Runner], seconds: float) -> list[Latency]:
    """Measure functions of this process in turns, each for `seconds`, or longer if one of them is unstable.

    Returns:
        One latency per runner, in the same order.
    """
    for runner in runners:
        warm_up(runner.call)
    return measure_interleaved([lambda call=runner.call: measure_window(call) for runner in runners], seconds)  # type: ignore[misc]


def measure_interleaved(windows: Sequence[WindowFunction], seconds: float) -> list[Latency]:
    """Call the functions in turns until each was measured for `seconds` and its last windows agree.

    Measuring ends after `MAX_DURATION_FACTOR` times `seconds` in any case. Only the last `seconds` of each are counted.

    Returns:
        One latency per function, in the same order.
    """
    minimum = max(STABLE_WINDOWS, round(seconds / WINDOW_S))
    measured: list[list[NDArray[np.float64]]] = [[] for _ in windows]
    for done in range(1, MAX_DURATION_FACTOR * minimum + 1 if windows else 0):
        for window, times in zip(windows, measured, strict=True):
            times.append(window())
            time.sleep(PAUSE_S)
        if done >= minimum and all(_spread(times) <= STABLE_SPREAD for times in measured):
            break
    return [_latency(times[-minimum:]) for times in measured]


def warm_up(call: Callable[[], object]) -> None:
    """Make the calls before the first window; fewer if they are long."""
    _call_uncounted(call, WARMUP_CALLS, WARMUP_CALLS * _LONG_CALL_S)


def measure_window(call: Callable[[], object]) -> NDArray[np.float64]:
    """Measure one window and return the time of each counted call in microseconds, at least one."""
    _call_uncounted(call, WINDOW_WARMUP_CALLS, _LONG_CALL_S)
    times: list[int] = []
    end = time.perf_counter_ns() + int(WINDOW_S * 1e9)
    while not times or time.perf_counter_ns() < end:
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return np.array(times, np.float64) / 1e3


def _call_uncounted(call: Callable[[], object], calls: int, seconds: float) -> None:
    """Make at least one call, and then stop after a number of calls or seconds, whichever comes first."""
    end = time.perf_counter_ns() + int(seconds * 1e9)
    for _ in range(calls):
        call()
        if time.perf_counter_ns() >= end:
            break


def _spread(windows: Sequence[NDArray[np.float64]]) -> float:
    medians = [float(np.median(window)) for window in windows[-STABLE_WINDOWS:]]
    return max(medians) / max(min(medians), 1e-9) - 1


def _latency(windows: Sequence[NDArray[np.float64]]) -> Latency:
    microseconds = np.concatenate(windows)
    percentiles = np.percentile(microseconds, np.arange(101)).round(3).tolist()
    return Latency(
        percentiles[50],
        percentiles[90],
        percentiles[99],
        float(microseconds.mean()),
        tuple(percentiles),
        len(microseconds),
        _spread(windows),
    )
