"""What a search found about its candidates: the records that its study and its report consist of."""

from typing import Literal, TypeAlias

import msgspec

from cifarx_export.optimization.candidates import Candidate
from cifarx_serve.spec import Precision
from cifarx_serve.system.environment import Environment

Outcome: TypeAlias = Literal["proved", "failed", "refused", "skipped", "not tried"]
Preference: TypeAlias = Literal["latency", "throughput", "size"]


class Latency(msgspec.Struct, frozen=True):
    """Wall time of a call with one image, host memory to host memory.

    Attributes:
        p50_us, p99_us: percentiles in microseconds.
        speedup: the p50 of the baseline, which was measured in turns with it, divided by its own.
        stable: whether both settled, see `cifarx_serve.benchmarking.timing`.
    """

    p50_us: float
    p99_us: float
    speedup: float
    stable: bool


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of an artifact on this machine.

    Attributes:
        provider: what ran it.
        threads: the number of threads that `infer` and `serve` run it with here.
        latency: with that number of threads.
        one_thread: in one thread; None if that is the same.
        images_per_s: the highest throughput of all batch sizes that were measured.
        batch: the batch size of that throughput.
        throughput_gain: that throughput divided by the highest one of the baseline.
        load_ms: the time to open the file in a new process, including the import of its library.
        first_call_ms: the time of the first call.
        peak_bytes: the peak memory of that process.
    """

    provider: str
    threads: int
    latency: Latency
    one_thread: Latency | None
    images_per_s: float
    batch: int
    throughput_gain: float
    load_ms: float
    first_call_ms: float
    peak_bytes: int


class CandidateResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a candidate.

    Attributes:
        format, precision, fine_tuned, pruned: the candidate.
        outcome: `proved` by its parity check; `failed` in it; `refused` by the converter or the runtime; `skipped`,
            because it could not win; or `not tried`, because the search ended before.
        reason: why it was not proved, or not measured; empty otherwise.
        file: name of the artifact in the directory of the study, if it was proved.
        sha256: hash of that file.
        size_bytes: its size.
        agreement: share of the images with the prediction of the network; None if it was not compared. The network is
            the original one also where the parity check compares a pruned candidate with the pruned network.
        agreement_bound: lower bound of the agreement with 95% confidence.
        accuracy, accuracy_drop: accuracy, and what it is below that of the network; None without labels.
        seconds: how long the conversion and the parity check took.
        versions: versions of the packages that it was made with, by name.
        facts: other facts about its conversion, as its spec states them.
        weights_sha256: hash of the file in the study with the fine-tuned weights that it was made from, if it was.
        weights_removed, multiplications_removed: shares that a pruned network lost.
        measurement: its speed; None if it was not measured.
    """

    format: str
    precision: Precision
    fine_tuned: bool = False
    pruned: float = 0.0
    outcome: Outcome
    reason: str = ""
    file: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    agreement: float | None = None
    agreement_bound: float | None = None
    accuracy: float | None = None
    accuracy_drop: float | None = None
    seconds: float | None = None
    versions: dict[str, str] = {}
    facts: dict[str, str] = {}
    weights_sha256: str | None = None
    weights_removed: float | None = None
    multiplications_removed: float | None = None
    measurement: Measurement | None = None

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.format, self.precision, self.fine_tuned, self.pruned)

    @property
    def name(self) -> str:
        """The name of the candidate."""
        return self.candidate.name

    @property
    def is_measured(self) -> bool:
        """Whether it was proved and measured."""
        return self.outcome == "proved" and self.measurement is not None


class OptimizationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `optimize`.

    Attributes:
        checkpoint, checkpoint_sha256: the network.
        data: what the candidates were proved on.
        reference_accuracy: accuracy of the network; None without labels.
        require: the requirement as it was written; empty for none.
        prefer: what is best among the candidates that meet it.
        targets: where the pick shall run.
        baseline: name of the candidate that speeds are relative to.
        results: all candidates, in the order in which they were tried.
        front: names of the candidates on the Pareto front, see `selection.pareto_front`.
        pick: name of the best candidate that meets the requirement; None if none does.
        reason: why it is the pick, or how near the nearest is.
        file: the file of the pick, beside the checkpoint.
        study: the directory of the study.
        stopped: what ended the search before all candidates were tried: `time`, `interrupt`, or nothing.
        seconds: how long this run took.
        environment: the machine and the library versions.
    """

    checkpoint: str
    checkpoint_sha256: str
    data: str
    reference_accuracy: float | None
    require: str
    prefer: Preference
    targets: tuple[str, ...]
    baseline: str | None
    results: tuple[CandidateResult, ...]
    front: tuple[str, ...]
    pick: str | None
    reason: str
    file: str | None
    study: str
    stopped: Literal["time", "interrupt"] | None
    seconds: float
    environment: Environment
