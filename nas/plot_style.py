"""How the report's figures look: colours, marks, and axes of milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from hw_profiles.shapes import BLOCK_BITS

# The precisions' colours are Okabe and Ito's (safe for the colour-blind), brighter where the page is dark.
LIGHT_COLOURS = {
    "paper": "#fefefe",
    "ink": "#1f2328",
    "muted": "#68707a",
    "grid": "#e2e5e9",
    "fp32": "#009e73",
    "bf16": "#a8508a",
    "fp16": "#8c6d1f",
    "int8": "#0072b2",
    "int4": "#d55e00",
    "mixed": "#e69f00",
}
DARK_COLOURS = {
    "paper": "#14171a",
    "ink": "#e4e7ea",
    "muted": "#98a1ab",
    "grid": "#2d3339",
    "fp32": "#2cc69b",
    "bf16": "#d98cc0",
    "fp16": "#c9a94f",
    "int8": "#56b4e9",
    "int4": "#f0883e",
    "mixed": "#f5c242",
}
PAPER, INK, MUTED, GRID = (LIGHT_COLOURS[name] for name in ("paper", "ink", "muted", "grid"))

#: What subnets are called of whose parts some have 8 bits and some 4.
MIXED = "mixed"
#: Marker and area by role; a precision has a colour, so hollow and filled tell seeds from searched subnets.
ROLES: dict[str, tuple[str, float]] = {
    "search": ("o", 26),
    "seed": ("o", 26),
    "refined": ("*", 60),
    "baseline": ("^", 38),
    "full": ("D", 44),
}
OTHER_ROLE = ("s", 26)
HOLLOW_ROLES = ("seed",)

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": PAPER,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
LABEL_BOX = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
WIDTH_INCHES = 6.6
#: Relative errors up to which the ground is shaded, and how strongly; the wider first.
ERROR_BANDS = ((0.10, 0.45), (0.05, 0.9))
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (1, 1)), (0, (5, 2, 1, 2)))
TOKENS_AT_ZERO = 32


def colour_of(precision: str) -> str:
    return LIGHT_COLOURS[precision] if precision in (*BLOCK_BITS, MIXED) else MUTED


def identity_axes(axes: Axes, values: Iterable[float]) -> None:
    """Equal log axes with the line where prediction and truth agree, and 10 % to either side."""
    values = [value for value in values if value > 0]
    log_axis(axes, "x", values)
    log_axis(axes, "y", values)
    line = np.array(axes.get_xlim())
    axes.fill_between(line, 0.9 * line, 1.1 * line, color=GRID, linewidth=0, alpha=0.7)
    axes.plot(line, line, color=MUTED, linewidth=0.8)
    axes.set_aspect("equal")


def time_axis(axes: Axes, values: Sequence[float]) -> None:
    """Linear, or logarithmic where the slowest takes more than four times as long as the fastest."""
    if max(values) > 4 * min(values):
        log_axis(axes, "x", values)
    else:
        room = 0.08 * (max(values) - min(values) or max(values))
        axes.set_xlim(min(values) - room, max(values) + room)


def log_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float], margin: float = 0.06) -> None:
    """Plain numbers on a log scale: the coarsest ladder with four of them in sight, else even steps."""
    shown = np.log10(np.array(list(values)))
    room = max(margin * np.ptp(shown), 0.03)
    low, high = float(10 ** (shown.min() - room)), float(10 ** (shown.max() + room))
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ladders = [np.outer(powers, steps).ravel() for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))]
    ladders.append(np.array(MaxNLocator(4).tick_values(low, high)))
    ticks = [ladder[(low <= ladder) & (ladder <= high)].tolist() for ladder in ladders]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(next((some for some in ticks if len(some) >= 4), ticks[-1])))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
