"""Latency of several runners, measured side by side so that their ratios hold when the machine drifts."""

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

WINDOW_S: Final = 0.1
"""One runner's turn. Long enough that the first calls of a turn, which find cold caches, can be left out."""

SETTLE_S: Final = 0.01
"""A pause between turns: thread pools spin for some milliseconds after their last call and take the next one's CPU."""

WARMUP_CALLS: Final = 3
"""Calls at the start of every turn that are not counted, of short calls; of long ones a single one."""

FIRST_CALLS: Final = 10
"""Calls before anything is counted: allocators, kernel choice and TorchScript's profiling runs end within them."""

STEADY_WINDOWS: Final = 3
"""So many windows in a row must agree, as NVIDIA's perf_analyzer has it."""

STEADY_SPREAD: Final = 0.10
"""To within this share of the least of their medians."""

PATIENCE: Final = 3
"""A runner that is not steady is measured up to so many times as long."""

_LONG_S: Final = 0.02

Turn: TypeAlias = Callable[[], NDArray[np.float64]]
"""Measures one window: the microseconds of each counted call, at least one."""


class Latency(msgspec.Struct, frozen=True):
    """Wall time of a call in microseconds, over `samples` calls.

    Attributes:
        percentiles: from the 0th, the shortest, to the 100th.
        spread: by how much the medians of the last windows differ, as a share of the least.
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
        return self.spread <= STEADY_SPREAD


class Runner(NamedTuple):
    """What to measure: `call` returns when its result is on the host, so copies count, alike for all."""

    name: str
    call: Callable[[], object]


def measure(runners: Sequence[Runner], seconds: float) -> list[Latency]:
    """Measure runners of this process in turns, each for `seconds`; longer where one of them is not steady.

    Returns:
        One latency a runner, in their order.
    """
    for runner in runners:
        warm_up(runner.call)
    return measure_in_turns([lambda call=runner.call: measure_window(call) for runner in runners], seconds)  # type: ignore[misc]


def measure_in_turns(turns: Sequence[Turn], seconds: float) -> list[Latency]:
    """Give each a window in turn until all have had `seconds` and the last windows of each agree.

    Where they never do, `PATIENCE` times `seconds` end it. The latest `seconds` of each count.
    """
    least = max(STEADY_WINDOWS, round(seconds / WINDOW_S))
    windows: list[list[NDArray[np.float64]]] = [[] for _ in turns]
    for done in range(1, PATIENCE * least + 1 if turns else 0):
        for turn, measured in zip(turns, windows, strict=True):
            measured.append(turn())
            time.sleep(SETTLE_S)
        if done >= least and all(_spread(measured) <= STEADY_SPREAD for measured in windows):
            break
    return [_latency(measured[-least:]) for measured in windows]


def warm_up(call: Callable[[], object]) -> None:
    """The calls before anything is counted; fewer where they are long."""
    _call_uncounted(call, FIRST_CALLS, FIRST_CALLS * _LONG_S)


def measure_window(call: Callable[[], object]) -> NDArray[np.float64]:
    """Microseconds of each counted call of one turn, at least one."""
    _call_uncounted(call, WARMUP_CALLS, _LONG_S)
    times: list[int] = []
    end = time.perf_counter_ns() + int(WINDOW_S * 1e9)
    while not times or time.perf_counter_ns() < end:
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return np.array(times, np.float64) / 1e3


def _call_uncounted(call: Callable[[], object], calls: int, seconds: float) -> None:
    """So many calls, or for so long; at least one."""
    end = time.perf_counter_ns() + int(seconds * 1e9)
    for _ in range(calls):
        call()
        if time.perf_counter_ns() >= end:
            break


def _spread(windows: Sequence[NDArray[np.float64]]) -> float:
    medians = [float(np.median(window)) for window in windows[-STEADY_WINDOWS:]]
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
