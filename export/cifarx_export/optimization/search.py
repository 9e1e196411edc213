"""The search: prove and measure one candidate after the other, until all were tried or the time is over."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec

from cifarx_export.optimization.candidates import Candidate
from cifarx_export.optimization.prospects import why_hopeless
from cifarx_export.optimization.requirement import Requirement
from cifarx_export.optimization.results import CandidateResult, Measurement, Preference
from cifarx_export.optimization.study import Study
from cifarx_serve.errors import CifarxError, OutputError, error_message
from cifarx_serve.progress import Progress

Prove: TypeAlias = Callable[[Candidate], CandidateResult]
"""Makes a candidate and proves it in its runtime. Raises a `CifarxError` if it cannot be made."""

Measure: TypeAlias = Callable[[CandidateResult, CandidateResult | None], Measurement]
"""Measures a proved candidate against the baseline, which is None for the baseline itself."""

Stopped: TypeAlias = Literal["time", "interrupt"]

_ENDS: Final[Mapping[Stopped, str]] = {"time": "the time was over", "interrupt": "the search was interrupted"}


class OutOfTime(BaseException):
    """Raised at the next step of the work when the time is over. It is no error, and no error handler catches it."""


class TimeLimit:
    """A limit for the time of the whole run. While it is enforced, work ends at its next line of progress.

    Args:
        seconds: the limit, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._is_enforced = False

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Enforce the limit within the block. The work before and after a search takes as long as it takes."""
        self._is_enforced = True
        try:
            yield
        finally:
            self._is_enforced = False

    def check(self) -> None:
        """Raise `OutOfTime` if the time is over and the limit is enforced."""
        if self._is_enforced and time.monotonic() >= self._end:
            raise OutOfTime

    def checking(self, progress: Progress) -> Progress:
        """Return a function that reports progress and checks the time."""

        def report(line: str) -> None:
            self.check()
            progress(line)

        return report


class Goal(NamedTuple):
    """What a search is for.

    Attributes:
        requirement: bounds that the pick must meet.
        prefer: what is best among the candidates that meet it.
        weight_bytes: size of the network's weights in fp32; 0 if it is not known.
    """

    requirement: Requirement
    prefer: Preference
    weight_bytes: int = 0


class Search:
    """Tries candidates in their order. What the study has already is not done again.

    Args:
        study: keeps the results.
        goal: what the search is for.
        prove, measure: do the work.
        limit: the limit of time.
        progress: called with a line of text at each step.

    Attributes:
        results: one result per candidate that was tried.
        stopped: what ended the search before all candidates were tried, or None.
    """

    def __init__(
        self, study: Study, goal: Goal, prove: Prove, measure: Measure, limit: TimeLimit, progress: Progress
    ) -> None:
        self._study = study
        self._goal = goal
        self._prove = prove
        self._measure = measure
        self._limit = limit
        self._progress = progress
        self.results: list[CandidateResult] = []
        self.stopped: Stopped | None = None

    @property
    def baseline(self) -> CandidateResult | None:
        """The first candidate that was measured: ONNX Runtime in fp32, unless the network cannot become that."""
        return next((result for result in self.results if result.is_measured), None)

    def run(self, candidates: Sequence[Candidate], following: int = 0) -> None:
        """Try the candidates, after those of earlier calls.

        Args:
            candidates: the candidates.
            following: how many are known to follow in later calls, for lines of progress.

        Raises:
            OutputError: a file cannot be written.
        """
        total = len(self.results) + len(candidates) + following
        for candidate in candidates:
            self.results.append(_without_artifact(candidate, "not tried"))
            with self._stopping(), self._limit.enforced():
                self._try(candidate, f"[{len(self.results)} of {total}] {candidate.name}")
            if self.stopped is not None:
                self.results[-1] = _with_end(self.results[-1], self.stopped)

    def _try(self, candidate: Candidate, heading: str) -> None:
        """Prove and measure a candidate, unless the study has that already. Each step replaces the last result."""
        known = self._study.get(candidate)
        if known is None and (reason := self._reason_to_skip(candidate)):
            if not candidate.fine_tuned:
                self._progress(f"skipped {candidate.name}: {reason}")
            self.results[-1] = _without_artifact(candidate, "skipped", reason)
            return
        if known is None:
            self._require_time()
            self._progress(heading)
            known = self._proved(candidate)
            if known.outcome != "refused":  # what was refused may work when a package is installed
                self._study.record(known)
        self.results[-1] = known
        if known.outcome == "proved" and known.measurement is None:
            self._require_time()
            known = self._measured(known)
            if known.measurement is not None:
                self._study.record(known)
            self.results[-1] = known

    def _reason_to_skip(self, candidate: Candidate) -> str | None:
        goal = self._goal
        return why_hopeless(candidate, self.results, goal.requirement, goal.prefer, goal.weight_bytes)

    def _require_time(self) -> None:
        """Stop if the time is over or the search was interrupted. What the study has already takes no time."""
        if self.stopped == "interrupt":
            raise KeyboardInterrupt
        self._limit.check()

    def _proved(self, candidate: Candidate) -> CandidateResult:
        try:
            return self._prove(candidate)
        except OutputError:
            raise
        except CifarxError as error:
            self._progress(f"refused {candidate.name}: {error}")
            return _without_artifact(candidate, "refused", str(error))
        except Exception as error:  # the errors of converters and runtimes have no common base class
            self._progress(f"refused {candidate.name}: {type(error).__name__} {error_message(error)}")
            return _without_artifact(candidate, "refused", f"{type(error).__name__}: {error_message(error)}")

    def _measured(self, proved: CandidateResult) -> CandidateResult:
        try:
            found = self._measure(proved, self.baseline)
        except OutputError:
            raise
        except (CifarxError, ModuleNotFoundError) as error:
            self._progress(f"cannot measure {proved.name}: {error}")
            return msgspec.structs.replace(proved, reason=str(error))
        return msgspec.structs.replace(proved, measurement=found)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Take the end of the time, and Ctrl-C, as the end of the search."""
        try:
            yield
        except OutOfTime:
            self.stopped = self.stopped or "time"
        except KeyboardInterrupt:
            self.stopped = "interrupt"


def _with_end(result: CandidateResult, stopped: Stopped) -> CandidateResult:
    """Return a result with the reason why it is incomplete, if it is."""
    if result.outcome == "not tried":
        return msgspec.structs.replace(result, reason=_ENDS[stopped])
    if result.outcome == "proved" and result.measurement is None and not result.reason:
        return msgspec.structs.replace(result, reason=f"not measured: {_ENDS[stopped]}")
    return result


def _without_artifact(
    candidate: Candidate, outcome: Literal["refused", "skipped", "not tried"], reason: str = ""
) -> CandidateResult:
    return CandidateResult(
        format=candidate.format,
        precision=candidate.precision,
        fine_tuned=candidate.fine_tuned,
        pruned=candidate.pruned,
        outcome=outcome,
        reason=reason,
    )
