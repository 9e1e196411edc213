"""Candidates that cannot win by what is known before they are made, so that they are not made."""

from collections.abc import Mapping, Sequence
from typing import Final

from cifarx_export.optimization.candidates import BASELINE, Candidate
from cifarx_export.optimization.requirement import Requirement, meets
from cifarx_export.optimization.results import CandidateResult, Preference
from cifarx_export.optimization.selection import merit
from cifarx_serve.spec import Precision

_MAX_GAIN: Final[Mapping[Precision, float]] = {"fp32": 1.0, "bf16": 2.5, "fp16": 2.5, "int8": 5.0}
"""How many times as fast as fp32 of the same format a precision can be. The most that was measured is 2.0 for bf16 and
3.9 for int8, both for ResNet-18 at 224 pixels on AVX-512 with VNNI."""

_WEIGHT_BYTES: Final[Mapping[Precision, int]] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}

_INSTALL: Final = "pip install"
"""Part of the error for a package that is not installed."""

_FIDELITY: Final = ("accuracy", "accuracy_drop", "agreement")
"""The quantities of a requirement that say how much of the network's answers is kept."""

_FOLDED: Final = 0.9
"""A file has at least this part of the weights, because batch normalization is folded into convolutions."""


def why_hopeless(
    candidate: Candidate,
    results: Sequence[CandidateResult],
    requirement: Requirement,
    prefer: Preference,
    weight_bytes: int,
) -> str | None:
    """Return why a candidate cannot become the pick, or None if it can.

    Args:
        candidate: a candidate that was not made yet.
        results: what became of the candidates before it.
        requirement, prefer: what the search is for.
        weight_bytes: size of the weights in fp32; 0 if it is not known.
    """
    if candidate == BASELINE:
        return None
    return (
        _refused_before(candidate, results)
        or _lost_by_pruning(candidate, results, requirement)
        or _too_large(candidate, results, requirement, prefer, weight_bytes)
        or _only_smaller(candidate, requirement, prefer)
        or _too_slow(candidate, results, requirement, prefer)
        or (_needs_no_fine_tuning(candidate, results, requirement) if candidate.fine_tuned else None)
    )


def _fp32_of(candidate: Candidate, results: Sequence[CandidateResult]) -> CandidateResult | None:
    wanted = Candidate(candidate.format, "fp32", pruned=candidate.pruned)
    return next((result for result in results if result.candidate == wanted and candidate != wanted), None)


def _refused_before(candidate: Candidate, results: Sequence[CandidateResult]) -> str | None:
    """Return why its format was refused: in fp32, or in any precision because a package is missing."""
    for result in results:
        is_general = result.precision == "fp32" or _INSTALL in result.reason
        same = result.format == candidate.format and result.pruned in (0, candidate.pruned)
        if same and result.outcome == "refused" and is_general:
            return f"as {result.name}"
    return None


def _lost_by_pruning(candidate: Candidate, results: Sequence[CandidateResult], requirement: Requirement) -> str | None:
    """Return why a lower precision of a pruned network is not made: it keeps no more of the answers than fp32."""
    fp32 = _fp32_of(candidate, results)
    if not candidate.pruned or fp32 is None or fp32.outcome != "proved":
        return None
    missed = [bound.text for bound in requirement if bound.name in _FIDELITY and not bound.holds(fp32)]
    return f"{fp32.name} misses {', '.join(missed)}" if missed else None


def _too_large(
    candidate: Candidate,
    results: Sequence[CandidateResult],
    requirement: Requirement,
    prefer: Preference,
    weight_bytes: int,
) -> str | None:
    if candidate.pruned:  # how many weights it has is not known before
        return None
    least = int(_FOLDED * weight_bytes * _WEIGHT_BYTES[candidate.precision] / _WEIGHT_BYTES["fp32"])
    for bound in requirement:
        if bound.name == "size" and not bound.allows(least):
            return f"its weights alone have {least / 1e6:,.1f} MB, and {bound.text} is required"
    sizes = [result.size_bytes or 0 for result in results if meets(requirement, result)]
    if prefer == "size" and sizes and least > min(sizes):
        return f"its weights alone have {least / 1e6:,.1f} MB, more than the smallest file so far"
    return None


def _only_smaller(candidate: Candidate, requirement: Requirement, prefer: Preference) -> str | None:
    wants_size = prefer == "size" or any(bound.name in ("size", "memory") for bound in requirement)
    if candidate.precision != "fp16" or wants_size:
        return None
    return "runtimes compute fp16 in fp32 on a CPU: its file is smaller, but it is not faster"


def _too_slow(
    candidate: Candidate, results: Sequence[CandidateResult], requirement: Requirement, prefer: Preference
) -> str | None:
    """Return why a candidate is too slow even if it gains as much over fp32 as any did."""
    fp32 = _fp32_of(candidate, results)
    matching = [merit(result, prefer) for result in results if meets(requirement, result)]
    if prefer == "size" or fp32 is None or not fp32.is_measured or not matching:
        return None
    most = merit(fp32, prefer) * _MAX_GAIN[candidate.precision]
    if most >= max(matching):
        return None
    return (
        f"its fp32 has a speed of {merit(fp32, prefer):.2f}, the best so far {max(matching):.2f}, and "
        f"{candidate.precision} gains a factor of {_MAX_GAIN[candidate.precision]:g} at most"
    )


def _needs_no_fine_tuning(
    candidate: Candidate, results: Sequence[CandidateResult], requirement: Requirement
) -> str | None:
    """Return why other weights are not needed. They are only where int8 lost too much of the network's answers."""
    usual = next((result for result in results if result.candidate == candidate._replace(fine_tuned=False)), None)
    if usual is None or usual.outcome in ("refused", "skipped", "not tried"):
        return "as without fine-tuning"
    lost = any(bound.name in _FIDELITY and not bound.holds(usual) for bound in requirement)
    return None if usual.outcome == "failed" or lost else f"{usual.name} keeps its answers without it"
