"""The metrics of every class as a table in Markdown, which TensorBoard shows as text."""

from collections.abc import Sequence
from typing import Final

from cifarx_train.classification_metrics import ClassMetrics, macro_average, worst_first

MAX_CLASSES: Final = 1000
"""Of more classes, the table has the worst ones: TensorBoard is slow to show more rows."""


def class_table(metrics: Sequence[ClassMetrics]) -> str:
    """Return a table with the worst class first and the macro average last."""
    shown = worst_first(metrics)[:MAX_CLASSES]
    rows = [(_escaped(each.name), each.precision, each.recall, each.f1, each.support) for each in shown]
    rows.append(("**macro average**", *macro_average(metrics), sum(each.support for each in metrics)))
    lines = ["| class | precision | recall | F1 | images |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {precision:.2%} | {recall or 0.0:.2%} | {f1 or 0.0:.2%} | {images:,} |"
        for name, precision, recall, f1, images in rows
    ]
    return "\n".join(lines)


def _escaped(name: str) -> str:
    """Return a name that stays in its cell. TensorBoard itself removes HTML."""
    return " ".join(name.split()).replace("\\", "\\\\").replace("|", "\\|")
