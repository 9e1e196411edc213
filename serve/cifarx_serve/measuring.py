"""Latency of several runners, measured side by side so that their ratios hold when the machine drifts."""

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

WINDOW_S: Final = 0.1
"""One runner's turn. Long enough that the first calls of a turn, which find cold caches, can be left out."""

SETTLE_S: Final = 0.01
"""A pause between turns: thread pools spin for some milliseconds after their last call and take the next one's CPU."""

WARMUP_CALLS: Final = 3
"""Calls at the start of every turn that are not counted."""

FIRST_CALLS: Final = 10
"""Calls before anything is counted: allocators, kernel choice and TorchScript's profiling runs end within them."""


class Latency(msgspec.Struct, frozen=True):
    """Percentiles of a call's wall time in microseconds, over `samples` calls."""

    p50_us: float
    p90_us: float
    p99_us: float
    samples: int


class Runner(NamedTuple):
    """What to measure: `call` returns when its result is on the host, so copies count, alike for all."""

    name: str
    call: Callable[[], object]


def measure(runners: Sequence[Runner], seconds: float) -> list[Latency]:
    """Measure runners in turns of `WINDOW_S` until each has had `seconds`.

    Returns:
        One latency a runner, in their order.
    """
    for runner in runners:
        for _ in range(FIRST_CALLS):
            runner.call()
    samples: list[list[int]] = [[] for _ in runners]
    for _ in range(max(1, round(seconds / WINDOW_S))):
        for runner, times in zip(runners, samples, strict=True):
            times.extend(_turn(runner.call))
            time.sleep(SETTLE_S)
    return [_latency(np.array(times, np.float64) / 1e3) for times in samples]


def _turn(call: Callable[[], object]) -> list[int]:
    """Nanoseconds of each counted call of one turn, at least one."""
    for _ in range(WARMUP_CALLS):
        call()
    times: list[int] = []
    end = time.perf_counter_ns() + int(WINDOW_S * 1e9)
    while not times or time.perf_counter_ns() < end:
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return times


def _latency(microseconds: NDArray[np.float64]) -> Latency:
    p50, p90, p99 = np.percentile(microseconds, (50, 90, 99))
    return Latency(float(p50), float(p90), float(p99), len(microseconds))
