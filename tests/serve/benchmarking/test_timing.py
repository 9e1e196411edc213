import time
from collections.abc import Callable

import pytest

from cifarx_serve.benchmarking.timing import (
    MAX_DURATION_FACTOR,
    STABLE_WINDOWS,
    WARMUP_CALLS,
    WINDOW_S,
    WINDOW_WARMUP_CALLS,
    Runner,
    measure,
)


class Clock:
    """A clock that advances only when a runner says so, so that the results are exact on any machine."""

    def __init__(self) -> None:
        self.ns = 0

    def runner(self, cost_us: Callable[[int], float], name: str = "x") -> Runner:
        """Return a runner whose call number n takes `cost_us(n)` microseconds."""
        calls = iter(range(10**9))

        def call() -> None:
            self.ns += round(cost_us(next(calls)) * 1e3)

        return Runner(name, call)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock.ns)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "ns", clock.ns + round(seconds * 1e9)))
    return clock


def test_a_runner_of_constant_latency(clock: Clock) -> None:
    [latency] = measure([clock.runner(lambda _: 1000)], seconds=1)
    assert (latency.p50_us, latency.p90_us, latency.p99_us) == (1000, 1000, 1000)
    assert latency.samples == 1000


def test_results_are_in_the_order_of_the_runners(clock: Clock) -> None:
    latencies = measure([clock.runner(lambda _, us=us: us) for us in (300, 100, 200)], seconds=0.3)  # type: ignore[misc]
    assert [latency.p50_us for latency in latencies] == [300, 100, 200]


def test_percentiles_show_the_tail(clock: Clock) -> None:
    """Two of a hundred calls are very slow, and thirteen are slow."""
    [latency] = measure([clock.runner(lambda n: 5000 if n % 50 == 0 else 1000 if n % 100 < 14 else 100)], seconds=1)
    assert (latency.p50_us, latency.p90_us, latency.p99_us) == (100, 1000, 5000)


def test_warm_up_calls_are_not_counted(clock: Clock) -> None:
    [latency] = measure([clock.runner(lambda n: 10_000 if n < WARMUP_CALLS else 100)], seconds=0.1)
    assert latency.p99_us == 100


def test_the_first_calls_of_a_window_are_not_counted(clock: Clock) -> None:
    """They find the caches filled by another runner."""
    window: list[str] = []

    def cost(name: str) -> Callable[[int], float]:
        def of_call(_: int) -> float:
            if window[-1:] != [name]:
                window.clear()
            window.append(name)
            return 5_000 if len(window) <= WINDOW_WARMUP_CALLS else 1_000

        return of_call

    latencies = measure([clock.runner(cost(name), name) for name in "ab"], seconds=1)
    assert [latency.p99_us for latency in latencies] == [1_000, 1_000]


def test_ratios_hold_while_the_machine_slows_down(clock: Clock) -> None:
    """Calls take longer and longer, but the second runner always takes three times as long as the first."""

    def drifting(us: float) -> Callable[[int], float]:
        return lambda _: us * (1 + clock.ns / 8e9)

    first, second = measure([clock.runner(drifting(us)) for us in (100, 300)], seconds=4)
    assert first.p99_us > 1.5 * 100
    assert second.p50_us / first.p50_us == pytest.approx(3, rel=0.02)


def test_a_call_longer_than_a_window_is_still_measured(clock: Clock) -> None:
    [latency] = measure([clock.runner(lambda _: 3 * WINDOW_S * 1e6)], seconds=0.001)
    assert latency.samples == STABLE_WINDOWS
    assert latency.p50_us == pytest.approx(3 * WINDOW_S * 1e6)


def test_more_seconds_yield_more_samples(clock: Clock) -> None:
    samples = [measure([clock.runner(lambda _: 1000)], seconds)[0].samples for seconds in (0.1, 0.5, 2)]
    assert samples == [300, 500, 2000]


def test_constant_latency_is_stable(clock: Clock) -> None:
    [latency] = measure([clock.runner(lambda _: 1000)], seconds=1)
    assert latency.stable
    assert latency.spread == 0


def test_continues_until_the_last_windows_agree(clock: Clock) -> None:
    """The latency varies for nearly two seconds and is constant afterwards."""
    settled = 1.9e9
    [latency] = measure([clock.runner(lambda _: 1000 * (1 + clock.ns // 10**8 % 3 * (clock.ns < settled)))], seconds=1)
    assert latency.stable
    assert settled < clock.ns < settled + 0.5e9


def test_measuring_ends_even_if_a_runner_stays_unstable(clock: Clock) -> None:
    [latency] = measure([clock.runner(lambda _: 1000 * (1 + clock.ns // 10**8 % 3))], seconds=1)
    assert not latency.stable
    assert latency.spread == pytest.approx(2, abs=0.5)
    assert clock.ns < (MAX_DURATION_FACTOR + 1) * 1.5e9


def test_one_unstable_runner_does_not_affect_the_others(clock: Clock) -> None:
    stable, unstable = measure(
        [clock.runner(lambda _: 1000), clock.runner(lambda _: 1000 * (1 + clock.ns // 10**8 % 5))], seconds=1
    )
    assert stable.stable
    assert not unstable.stable


def test_percentiles_range_from_the_minimum_to_the_maximum(clock: Clock) -> None:
    [latency] = measure([clock.runner(lambda n: 100 + n % 101)], seconds=1)
    assert len(latency.percentiles) == 101
    assert list(latency.percentiles) == sorted(latency.percentiles)
    assert (latency.percentiles[0], latency.percentiles[100]) == (100, 200)
    assert (latency.p50_us, latency.p90_us, latency.p99_us) == tuple(latency.percentiles[p] for p in (50, 90, 99))
    assert latency.mean_us == pytest.approx(150, abs=1)


def test_long_calls_are_warmed_up_once(clock: Clock) -> None:
    calls: list[int] = []

    def cost(number: int) -> float:
        calls.append(number)
        return 2 * WINDOW_S * 1e6

    measure([clock.runner(cost)], seconds=0.1)
    assert len(calls) == 1 + STABLE_WINDOWS * 2


def test_no_runners_have_no_results() -> None:
    assert measure([], seconds=1) == []


def test_an_exception_of_a_runner_is_raised() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure([Runner("failing", fail)], seconds=0.1)


def test_with_a_real_clock() -> None:
    [latency] = measure([Runner("sum", lambda: sum(range(1000)))], seconds=0.1)
    assert latency.samples >= 1
    assert 0 < latency.p50_us <= latency.p90_us <= latency.p99_us
