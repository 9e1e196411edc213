"""Formats a diagnosis for the terminal: a table of the best preprocessings, and the options that use the first."""

import io
import json
import shlex
import sys
from typing import TYPE_CHECKING, Final

from cifarx.output.console import can_print_unicode, table_width
from cifarx_export.diagnosis.candidates import cropped, unit_scaling
from cifarx_export.diagnosis.diagnose import Diagnosis, Trial
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.terminal import printable
from cifarx_train.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from rich.table import Table

_BAR: Final = 12
"""The width of the bar of an accuracy of 100%."""

_IMAGENET_CROP: Final = 224 / 256
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


def diagnosis_lines(diagnosis: Diagnosis) -> str:
    """Return the table and the remarks, as wide as standard output, and in color if that is a terminal.

    The text has no final newline. Names come from files, so unprintable characters are replaced.
    """
    from rich.console import Console
    from rich.text import Text

    text = io.StringIO()
    console = Console(file=text, width=table_width(), force_terminal=sys.stdout.isatty(), highlight=False)
    best = diagnosis.trials[0]
    console.print(
        Text(
            printable(
                f"{diagnosis.file} on {best.images:,} images of {diagnosis.data}: "
                f"{diagnosis.classes} classes, chance is {diagnosis.chance:.1%}"
            ),
            "bold",
        )
    )
    console.print(_table(diagnosis))
    for line in _remarks(diagnosis):
        console.print(Text(printable(line)), overflow="fold")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def best_flags(diagnosis: Diagnosis) -> str | None:
    """Return the options of the command line for the first trial, or None if only a spec file can state them."""
    flags = _input_flags(diagnosis.spec.input)
    names = diagnosis.spec.class_names
    if flags is None or any("," in name for name in names):
        return None
    if diagnosis.trials[0].class_order != "as stated":
        flags += ["--classes", ",".join(names)]
    return shlex.join(flags)


def spec_document(diagnosis: Diagnosis) -> str:
    """Return the first trial as a TOML document for `--spec`. TOML has the strings, numbers and arrays of JSON."""
    spec = diagnosis.spec
    names = (
        [] if diagnosis.trials[0].class_order == "as stated" else [f"class_names = {json.dumps(spec.class_names)}", ""]
    )
    fields = {name: getattr(spec.input, name) for name in InputSpec.__struct_fields__ if name != "dtype"}
    values = [f"{name} = {json.dumps(value)}" for name, value in fields.items() if value is not None]
    return "\n".join([*names, "[input]", *values])


def _table(diagnosis: Diagnosis) -> "Table":
    """Return a table with one row for each trial."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid: Table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, right in (("", True), ("accuracy", True), ("", False), ("95% interval", False)):
        grid.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for heading in ("values", "color", "resize", "filter", "classes", ""):
        grid.add_column(heading, overflow="fold")
    for position, trial in enumerate(diagnosis.trials):
        style = "bold green" if position == 0 else "" if trial.tied else "dim"
        cells = [
            _mark(position, trial),
            f"{trial.accuracy:.1%}",
            _bar(trial.accuracy),
            f"{trial.low:.1%} to {trial.high:.1%}",
            trial.scaling,
            trial.input.color,
            _resizing(trial.input),
            trial.input.interpolation if trial.input.antialias else f"{trial.input.interpolation}, no antialias",
            trial.class_order,
            "stated before" if trial.stated else "",
        ]
        grid.add_row(*[Text(printable(cell), style) for cell in cells])
    return grid


def _mark(position: int, trial: Trial) -> str:
    """Return the rank, with an equals sign for a trial that is as good as the first one."""
    return f"= {position + 1}" if trial.tied and position else f"{position + 1}"


def _bar(share: float) -> str:
    if not can_print_unicode():
        return "#" * round(share * _BAR)
    eighths = round(share * _BAR * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _resizing(size: InputSpec) -> str:
    sides = f"{size.height}x{size.width}"
    if size.resize == "shorter_side":
        return f"shorter side {size.resize_to}, crop {sides}"
    if size.resize_to is not None:
        return f"stretch {size.resize_to}, crop {sides}"
    return f"{size.resize} {sides}"


def _remarks(diagnosis: Diagnosis) -> list[str]:
    """Return what the table does not say: ties, the trials of the search, and whether the best is any good."""
    best, before = diagnosis.trials[0], next(trial for trial in diagnosis.trials if trial.stated)
    lines = []
    if any(trial.tied for trial in diagnosis.trials[1:]):
        choice = "the one that was stated before" if before.tied else "the one that the training used"
        lines.append(f"= as good as the first, by McNemar's exact test at 5% for all pairs: choose {choice}")
    if best.class_order == "assigned":
        lines.append(
            "assigned: the classes are in no known order, so each one was assigned to an output; the accuracy is that "
            "on images that the assignment has not seen"
        )
    if diagnosis.at_chance:
        lines.append(
            "even the best is no better than chance: the weights do not fit the network, or the images are not of its "
            "classes"
        )
    searched = ", ".join(f"{rung.candidates} on {rung.images:,}" for rung in diagnosis.rungs)
    lines.append(f"tried: {searched} images")
    return lines


def _input_flags(size: InputSpec) -> list[str] | None:
    """Return the options that state an input, or None if there are none for its way of resizing."""
    side = f"{size.height}" if size.height == size.width else f"{size.height}x{size.width}"
    plain = size.interpolation == "bilinear" and size.antialias and size.crop_offset == "round"
    if not plain or size.layout != "NCHW":
        return None
    sides = (size.height, size.width)
    if size.resize == "stretch" and size.resize_to is None:
        name, preset = "cifarx", Preprocessing.cifarx(sides)
    elif size.resize == "shorter_side" and size.resize_to == cropped(size, _IMAGENET_CROP).resize_to:
        name, preset = "imagenet", Preprocessing.imagenet(sides)
    else:
        return None
    flags = ["--preprocessing", name, "--image-size", side]
    mean, std = unit_scaling(size)
    if (mean, std) != (preset.mean, preset.std):
        flags += ["--mean", _numbers(mean), "--std", _numbers(std)]
    return [*flags, "--color", size.color] if size.color != "RGB" else flags


def _numbers(values: tuple[float, ...]) -> str:
    shown = values[:1] if len(set(values)) == 1 else values
    return ",".join(f"{value:.9g}" for value in shown)
