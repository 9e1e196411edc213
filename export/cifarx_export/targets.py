"""Which artifacts to write, and where: given as names of formats, or as the path of one artifact."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from cifarx_export.formats.registry import FORMATS, PRECISIONS, ExportOptions, require_supported
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import Precision


class Targets(NamedTuple):
    """The artifacts to write.

    Attributes:
        pairs: the format and the precision of each, without repetition.
        path: the path of the only artifact, or None if it is named after the checkpoint.
    """

    pairs: list[tuple[str, Precision]]
    path: Path | None

    @property
    def precisions(self) -> list[Precision]:
        """The precisions, without repetition."""
        return list(dict.fromkeys(precision for _, precision in self.pairs))


def find_targets(formats: Sequence[str] | Path, precisions: Sequence[str] | None, options: ExportOptions) -> Targets:
    """Return the artifacts for the arguments of `export`.

    Args:
        formats: names of formats; or a path whose suffix names the format, and before it possibly the precision, as in
            `net.int8.onnx`.
        precisions: names of precisions. The default is fp32, or the precision in the path.
        options: options of the conversion.

    Raises:
        UsageError: a name or a suffix is unknown, several precisions were given for one path, or a format does not
            support a precision or an option.
    """
    path = None
    if isinstance(formats, str | Path):
        name = str(formats)
        if name in FORMATS:
            formats = [name]
        else:
            path = Path(name)
            formats, in_name = _read_name(path)
            precisions = precisions or in_name
    wanted = dict.fromkeys((name, precision) for name in formats for precision in precisions or ("fp32",))
    for name, precision in wanted:
        require_supported(name, precision, options)
    if path is not None and len(wanted) > 1:
        raise UsageError(f"several precisions cannot be written to {path}", "export one precision to one path")
    return Targets([(name, cast("Precision", precision)) for name, precision in wanted], path)


def _read_name(path: Path) -> tuple[list[str], list[str] | None]:
    """Return the format that the suffix of a path names, and the precision before it, if there is one."""
    matching = [(row.suffix, name) for name, row in FORMATS.items() if path.name.endswith(row.suffix)]
    if not matching:
        suffixes = ", ".join(dict.fromkeys(row.suffix for row in FORMATS.values()))
        raise UsageError(f"the name of {path} has no suffix of a format", f"end it with one of {suffixes}")
    suffix, name = max(matching, key=lambda pair: len(pair[0]))
    precision = path.name.removesuffix(suffix).rpartition(".")[2]
    return [name], [precision] if precision in PRECISIONS else None
