"""The choice among measured candidates: the Pareto front, the pick, and the reason for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from cifarx_export.optimization.candidates import Candidate
from cifarx_export.optimization.requirement import Requirement, meets
from cifarx_export.optimization.results import CandidateResult, Measurement, Preference

TIE: Final = 0.03
"""Candidates that are within this part of the best are equally good: two measurements of one file differ as much."""


def merit(result: CandidateResult, prefer: Preference) -> float:
    """Return how good a measured candidate is by the preference: relative to the baseline for speeds; higher is better.

    For the size it is the inverse of the number of bytes.
    """
    assert result.measurement is not None, "only measured candidates are compared"
    return _MERITS[prefer](result)


def _latency(result: CandidateResult) -> float:
    assert result.measurement is not None
    return result.measurement.latency.speedup


def _throughput(result: CandidateResult) -> float:
    assert result.measurement is not None
    return result.measurement.throughput_gain


def _size(result: CandidateResult) -> float:
    return 1 / max(1, result.size_bytes or 0)


_MERITS: Final[Mapping[Preference, Callable[[CandidateResult], float]]] = {
    "latency": _latency,
    "throughput": _throughput,
    "size": _size,
}


def pareto_front(results: Sequence[CandidateResult], prefer: Preference) -> list[CandidateResult]:
    """Return the measured candidates that no other one surpasses in both the preference and the agreement.

    A candidate surpasses another if it is at least as good in both and better in one.
    """
    measured = [result for result in results if result.is_measured]
    values = [(merit(result, prefer), result.agreement or 0.0) for result in measured]
    return [
        result
        for result, (good, agreement) in zip(measured, values, strict=True)
        if not any(
            other_good >= good and other >= agreement and (other_good, other) != (good, agreement)
            for other_good, other in values
        )
    ]


def choose(results: Sequence[CandidateResult], requirement: Requirement, prefer: Preference) -> CandidateResult | None:
    """Return the best measured candidate that meets the requirement, or None if none does.

    Of those that are within `TIE` of the best, it is the one with the highest agreement, and then the smallest.
    """
    matching = [result for result in results if meets(requirement, result)]
    if not matching:
        return None
    best = max(merit(result, prefer) for result in matching)
    tied = [result for result in matching if merit(result, prefer) >= (1 - TIE) * best]
    return min(tied, key=lambda result: (-(result.agreement or 0.0), result.size_bytes or 0, -merit(result, prefer)))


def choose_pruned(
    results: Sequence[CandidateResult], requirement: Requirement, prefer: Preference, share: float
) -> list[Candidate]:
    """Return the candidates with pruned channels: those in the format of the best candidate so far.

    They are fp32 and the precisions in which that format was measured without pruning: a format that is slower with
    all channels is not likely to be faster with fewer. Fp32 is first, because it shows what pruning alone costs.

    Args:
        results: what became of the candidates with all channels.
        requirement, prefer: what the search is for.
        share: the share of the channels to remove.
    """
    best = choose(results, requirement, prefer) or choose(results, (), prefer)
    if best is None:
        return []
    measured = (result.precision for result in results if result.is_measured and result.format == best.format)
    return [Candidate(best.format, precision, pruned=share) for precision in dict.fromkeys(("fp32", *measured))]


def explain_pick(
    picked: CandidateResult,
    results: Sequence[CandidateResult],
    requirement: Requirement,
    prefer: Preference,
    baseline: str,
) -> str:
    """Return one line that says why a candidate is the pick."""
    matching = [result for result in results if meets(requirement, result)]
    assert picked.measurement is not None
    found = picked.measurement
    what = {
        "latency": f"{found.latency.speedup:.2f} times as fast as {baseline} at batch 1{_threads(found)}",
        "throughput": f"{found.throughput_gain:.2f} times the throughput of {baseline}",
        "size": f"{(picked.size_bytes or 0) / 1e6:,.2f} MB",
    }[prefer]
    if picked.name == baseline and prefer != "size":
        what = "the baseline itself"
    best = max(merit(result, prefer) for result in matching)
    superlative = {"latency": "the fastest", "throughput": "the highest throughput", "size": "the smallest"}[prefer]
    if merit(picked, prefer) < best:
        superlative = f"within {TIE:.0%} of {superlative}, with the highest agreement,"
    fidelity = f"agreement {picked.agreement:.2%}" if picked.agreement is not None else "agreement unknown"
    if picked.accuracy_drop is not None:
        fidelity += f", accuracy {0 - 100 * picked.accuracy_drop:+.2f} points"
    condition = f" that meet {', '.join(bound.text for bound in requirement)}" if requirement else ""
    return f"{what}; {fidelity}; {superlative} of {_count(len(matching))}{condition}"


def _threads(found: Measurement) -> str:
    """Return with how many threads a latency was measured, and how fast one thread is."""
    if found.one_thread is None:
        return ""
    return f" in {found.threads} threads, {found.one_thread.speedup:.2f} times in one"


def _count(number: int) -> str:
    return "1 candidate" if number == 1 else f"{number} candidates"
