"""The look of the plots in reports: colors, fonts and grid."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import matplotlib.style

COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito for color-blind readers, without its yellow, which is too faint on white."""

INK: Final = "#1b1f24"
QUIET: Final = "#5b6470"
_RULE: Final = "#dfe3e8"

_STYLE: Final = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so the plots are the same on every machine
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a file name is not a formula
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "cifarx",  # makes the ids reproducible
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Apply the report style to matplotlib, and restore the user's settings afterwards."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # drawn as a box
        yield
