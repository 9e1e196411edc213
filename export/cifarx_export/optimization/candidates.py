"""The candidates of a search: every format and precision for the stated targets, the most promising first."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from cifarx_export.formats.registry import FORMATS, PRECISIONS, Format
from cifarx_serve.errors import UsageError, unknown_name_error
from cifarx_serve.spec import Precision


class Candidate(NamedTuple):
    """One artifact to try.

    Attributes:
        format: name of the format.
        precision: the precision.
        fine_tuned: whether the network is fine-tuned for the precision first.
        pruned: the share of the channels that the network loses first; 0 for none.
    """

    format: str
    precision: Precision
    fine_tuned: bool = False
    pruned: float = 0.0

    @property
    def name(self) -> str:
        """A name for tables and messages, such as `onnx int8`."""
        changes = f"{' tuned' if self.fine_tuned else ''}{f' pruned {100 * self.pruned:g}%' if self.pruned else ''}"
        return f"{self.format} {self.precision}{changes}"


BASELINE: Final = Candidate("onnx", "fp32")
"""What every candidate is measured in turns with, also where it is not itself a candidate."""

_FORMATS_OF_TARGET: Final[Mapping[str, tuple[str, ...]]] = {
    "edge": ("onnx", "litert", "executorch"),
    "web": ("web",),
}

TARGETS: Final = ("cpu", *_FORMATS_OF_TARGET)
"""Where the pick shall run: `cpu` is a server or desktop with Python, `edge` a device with a small runtime without it,
`web` a browser."""

_LATE: Final = ("aotinductor", "pt2", "torchscript")
"""Formats that are tried after all others. The conversion of the first runs a compiler for about a minute. The other
two run operator by operator in PyTorch, which makes their parity checks slow."""

_ORDER: Final[tuple[Precision, ...]] = ("bf16", "int8", "fp32", "fp16")
"""The order of precisions, by how likely the best candidate is among them; fp16 is only smaller on a CPU."""


def parse_targets(text: str) -> tuple[str, ...]:
    """Parse targets separated by commas, such as `cpu,edge`.

    Raises:
        UsageError: a target is unknown, or there is none.
    """
    targets = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not targets:
        raise UsageError("--targets names no target", f"give one or more of {', '.join(TARGETS)}")
    for target in targets:
        if target not in TARGETS:
            raise unknown_name_error("target", target, TARGETS)
    return targets


def list_candidates(targets: Sequence[str], formats: Mapping[str, Format] = FORMATS) -> list[Candidate]:
    """Return the candidates for targets in the order in which they are tried: every precision of every format.

    Int8 is a candidate twice: after the usual calibration, and with weights that are fine-tuned for it. The baseline is
    first. Then come those that gain the most for the time that they take, so that a search that ends early has found
    most of what there is.
    """
    names = [name for name, row in formats.items() if any(_runs_on(target, name, row) for target in targets)]
    found = [Candidate(name, precision) for name in names for precision in formats[name].precisions]
    found += [one._replace(fine_tuned=True) for one in found if one.precision == "int8"]
    return sorted(found, key=_rank)


def is_late(candidate: Candidate) -> bool:
    """Return whether a candidate is tried after all others because its format takes long."""
    return candidate.format in _LATE


def _rank(candidate: Candidate) -> tuple[int, int, int, bool]:
    if candidate == BASELINE:
        return -1, 0, 0, False
    if not is_late(candidate):
        return 0, 0, _ORDER.index(candidate.precision), candidate.fine_tuned
    # Their other precisions are tried only if fp32 is fast enough.
    return 1, _LATE.index(candidate.format), PRECISIONS.index(candidate.precision), candidate.fine_tuned


def _runs_on(target: str, name: str, row: Format) -> bool:
    """Return whether a format is for a target. An artifact that is a directory contains the file of another format."""
    if target == "cpu":
        return "cpu" in row.devices and row.directory_suffix is None
    return name in _FORMATS_OF_TARGET[target]
