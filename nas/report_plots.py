"""The report's figures, each a plain `Figure` that can also be saved on its own."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from hw_profiles.shapes import BLOCK_BITS
from nas.latency import LatencyCurve
from nas.pareto import pareto_front
from nas.subnet import Subnet

if TYPE_CHECKING:
    from nas.report import MeasuredLatency, ReportData, TrialPoint

T = TypeVar("T")
P = TypeVar("P", "MeasuredLatency", LatencyCurve)

# The precisions' colours are Okabe and Ito's (safe for the colour-blind), brighter where the page is dark.
LIGHT_COLOURS = {
    "paper": "#fefefe",
    "ink": "#1f2328",
    "muted": "#68707a",
    "grid": "#e2e5e9",
    "fp32": "#009e73",
    "bf16": "#a8508a",
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


def pareto_figure(data: ReportData) -> Figure:
    """KL against TPOT of every trial, the Pareto front, the budget, and the chosen subnet with its interval."""
    if not data.trials:
        raise ValueError("wanted at least one trial to draw, got none")
    tpot_ms = np.array([trial.tpot_ms for trial in data.trials])
    kl = _above_zero([trial.kl for trial in data.trials])
    interval_ms = data.chosen_predicted or ()
    budget_ms = [] if data.budget_tpot_ms is None else [data.budget_tpot_ms]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 4.4), layout="constrained")
        axes = figure.add_subplot(xlabel="TPOT, ms per token", ylabel="KL to the full model, nats per token")
        _time_axis(axes, [*tpot_ms, *budget_ms, *interval_ms])
        _log_axis(axes, "y", kl, margin=0.1)

        for limit_ms in budget_ms:
            axes.axvspan(limit_ms, axes.get_xlim()[1], color=GRID, alpha=0.45, linewidth=0, zorder=0)
            axes.axvline(limit_ms, color=INK, linewidth=1, linestyle=(0, (4, 3)), gid="budget")
            top = (limit_ms, 1.0)
            axes.annotate(
                f"budget {limit_ms:.4g} ms", top, (0, 4), ("data", "axes fraction"), "offset points", ha="center"
            )
        front = pareto_front(np.column_stack([tpot_ms, kl]))
        axes.step(tpot_ms[front], kl[front], where="post", color=INK, linewidth=1.1, zorder=1.5, gid="front")
        for role in _distinct(trial.role for trial in data.trials):
            for precision in _distinct(trial.precision for trial in data.trials):
                some = [i for i, trial in enumerate(data.trials) if (trial.role, trial.precision) == (role, precision)]
                if some:
                    marker, area = ROLES.get(role, OTHER_ROLE)
                    colour = _colour(precision)
                    axes.scatter(
                        tpot_ms[some],
                        kl[some],
                        s=area,
                        marker=marker,
                        facecolor="none" if role in HOLLOW_ROLES else colour,
                        edgecolor=colour if role in HOLLOW_ROLES else PAPER,
                        linewidth=1.1 if role in HOLLOW_ROLES else 0.6,
                        zorder=2.2 if role == "full" else 2,
                        gid=f"trials-{role}-{precision}",
                    )
        for x, y, trial in zip(tpot_ms, kl, data.trials, strict=True):
            if trial.subnet_id == data.chosen_id:
                _mark_chosen(axes, x, y, trial, data.chosen_predicted)
            elif trial.role == "full":
                _label_full(axes, x, y, trial)
        figure.legend(handles=_pareto_legend(data), loc="outside lower center", ncols=5, handletextpad=0.5)
    return figure


def layers_figure(subnet: Subnet, full: Subnet) -> Figure:
    """What each layer keeps, over what it has in the full model: KV groups above, FFN width below."""
    pairs = list(zip(subnet.layers, full.layers, strict=True))
    colour = _colour(subnet.precision)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.3), layout="constrained")
        groups, widths = figure.subplots(2, 1, sharex=True)
        _kept_bars(groups, [(kept.num_key_value_heads, whole.num_key_value_heads) for kept, whole in pairs], colour)
        _kept_bars(widths, [(kept.intermediate_size, whole.intermediate_size) for kept, whole in pairs], colour)
        most = max(whole.num_key_value_heads for _, whole in pairs)
        for boundary in range(1, most if most <= 16 else 0):
            groups.axhline(boundary, color=PAPER, linewidth=1)
        groups.set_title("attention: KV groups")
        widths.set_title("MLP: FFN width")
        widths.set_xlabel("layer")
        widths.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        handles = [
            Patch(color=colour, label="kept"),
            Patch(color=GRID, label="removed"),
            Line2D([], [], linestyle="", marker="x", color=INK, markersize=5, label="skipped altogether"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def latency_figure(latency: Sequence[MeasuredLatency]) -> Figure:
    """Predicted against measured latency of held-out graphs: a row a runtime, a column a phase."""
    return _panels(latency, _latency_panel, [Patch(color=GRID, label="±10 % of measured")])


def error_figure(latency: Sequence[MeasuredLatency]) -> Figure:
    """How far the predictions of held-out graphs are off, by size of the graph: a row a runtime, a column a phase."""
    bands = [Patch(color=GRID, alpha=alpha, label=f"±{100 * band:.0f} %") for band, alpha in ERROR_BANDS]
    return _panels(latency, _error_panel, bands)


def curves_figure(curves: Sequence[LatencyCurve]) -> Figure:
    """The full model's latency over tokens, a line for each precision and batch: a row a runtime, a column a phase."""
    batches = sorted({curve.batch_size for curve in curves})
    styles = dict(zip(batches, itertools.cycle(LINE_STYLES)))

    def draw(axes: Axes, some: Sequence[LatencyCurve], precisions: Sequence[str]) -> None:
        _curves_panel(axes, some, styles)

    handles = [Line2D([], [], linestyle="", marker="o", color=MUTED, markersize=4, label="measured")]
    if len(batches) > 1:
        handles += [Line2D([], [], color=MUTED, linestyle=styles[batch], label=f"batch {batch}") for batch in batches]
    return _panels(curves, draw, handles)


def quality_figure(quality: Sequence[tuple[float, float]]) -> Figure:
    """Predicted against measured KL of held-out trials."""
    predicted, measured = (_above_zero(values) for values in zip(*quality, strict=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES / 2, 3.1), layout="constrained")
        axes = figure.add_subplot(xlabel="measured KL", ylabel="predicted KL")
        _identity(axes, [*predicted, *measured])
        axes.scatter(measured, predicted, s=20, color=_colour("int8"), edgecolor=PAPER, linewidth=0.5, gid="quality")
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure in the format of the path's suffix."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=200)
    return path


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element whose colours are the page's CSS variables and whose ids begin with `name`."""
    text = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])  # HTML knows the namespaces
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\1{name}-", svg)
    variables = {colour: f"var(--{key})" for key, colour in LIGHT_COLOURS.items()}
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), svg)


def precision_name(bits: int) -> str:
    return next((name for name, own in BLOCK_BITS.items() if own == bits), f"{bits} bits")


def _colour(precision: str) -> str:
    return LIGHT_COLOURS[precision] if precision in (*BLOCK_BITS, MIXED) else MUTED


def _mark_chosen(
    axes: Axes, x: float, y: float, trial: TrialPoint, predicted: tuple[float, float, float] | None
) -> None:
    if predicted:
        axes.hlines(y, predicted[1], predicted[2], color=INK, linewidth=2, zorder=2.8, gid="interval")
    colour = _colour(trial.precision)
    axes.plot(x, y, marker="*", markersize=15, color=colour, markeredgecolor=INK, zorder=3, gid="chosen")
    text = f"chosen: {trial.subnet_id}\n{trial.tpot_ms:.3g} ms, KL {trial.kl:.2g}"
    below = (0.03, 0.6 * axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1])
    leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.7, "shrinkB": 7, "relpos": (0.2, 1)}
    # towards the lower left, where no trial can be: it would have been better than the chosen one
    axes.annotate(
        text, (x, y), below, textcoords="axes fraction", va="top", arrowprops=leader, bbox=LABEL_BOX, zorder=4
    )


def _label_full(axes: Axes, x: float, y: float, trial: TrialPoint) -> None:
    text = f"full, {trial.precision}" + (", KL 0" if trial.kl <= 0 else "")
    side = "right" if axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0] > 0.85 else "center"
    axes.annotate(text, (x, y), (0, -8), textcoords="offset points", ha=side, va="top", bbox=LABEL_BOX, zorder=4)


def _pareto_legend(data: ReportData) -> list[Line2D]:
    handles = [
        Line2D([], [], linestyle="", marker="o", color=_colour(precision), label=precision)
        for precision in (*BLOCK_BITS, MIXED)
        if precision in {trial.precision for trial in data.trials}
    ]
    for role in _distinct(trial.role for trial in data.trials):
        face = "none" if role in HOLLOW_ROLES else MUTED
        marker = ROLES.get(role, OTHER_ROLE)[0]
        handles.append(Line2D([], [], linestyle="", marker=marker, color=MUTED, markerfacecolor=face, label=role))
    return [*handles, Line2D([], [], color=INK, linewidth=1.1, label="Pareto front")]


def _kept_bars(axes: Axes, sizes: Sequence[tuple[int, int]], colour: str) -> None:
    kept, whole = np.array(sizes).T
    layers = np.arange(len(sizes))
    axes.bar(layers, whole, width=0.8, color=GRID)
    axes.bar(layers, kept, width=0.8, color=colour)
    skipped = layers[kept == 0]
    axes.plot(skipped, whole[skipped] / 2, "x", color=INK, markersize=5, markeredgewidth=1.3, gid="skipped")
    axes.grid(False)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_ylim(0, whole.max())
    axes.set_yticks([0, whole.max() / 2, whole.max()] if whole.max() > 16 else range(0, whole.max() + 1))
    axes.tick_params(axis="x", length=0)


def _panels(
    rows: Sequence[P],
    draw: Callable[[Axes, Sequence[P], Sequence[str]], None],
    handles: Sequence[Artist],
) -> Figure:
    """A row of panels a runtime, a column a phase, and a legend of the precisions and of `handles`."""
    runtimes, phases = _distinct(row.runtime for row in rows), _distinct(row.phase for row in rows)
    precisions = _distinct(row.precision for row in rows)
    with mpl.rc_context(STYLE):
        columns = max(len(phases), 2)  # a single panel stays as large as one of two
        figure = Figure(figsize=(WIDTH_INCHES * len(phases) / columns, 3.1 * len(runtimes)), layout="constrained")
        panels = figure.subplots(len(runtimes), len(phases), squeeze=False)
        for runtime, panels_of_runtime in zip(runtimes, panels, strict=True):
            for phase, axes in zip(phases, panels_of_runtime, strict=True):
                some = [row for row in rows if (row.runtime, row.phase) == (runtime, phase)]
                axes.set_visible(bool(some))
                if some:
                    draw(axes, some, precisions)
                    axes.set_title(f"{runtime}, {phase}")
        legend: list[Artist] = [
            Line2D([], [], linestyle="", marker="o", color=_colour(name), label=name) for name in precisions
        ]
        legend += handles
        figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 6))
    return figure


def _latency_panel(axes: Axes, points: Sequence[MeasuredLatency], precisions: Sequence[str]) -> None:
    _identity(axes, [value for point in points for value in (point.measured_ms, point.low_ms, point.high_ms)])
    for precision in precisions:
        some = [point for point in points if point.precision == precision]
        measured = [point.measured_ms for point in some]
        lows, highs = [point.low_ms for point in some], [point.high_ms for point in some]
        axes.vlines(measured, lows, highs, color=_colour(precision), linewidth=0.9, alpha=0.6)
        axes.scatter(
            measured,
            [point.predicted_ms for point in some],
            s=16,
            color=_colour(precision),
            edgecolor=PAPER,
            linewidth=0.4,
            zorder=3,
            gid=f"latency-{precision}",
        )
    axes.set(xlabel="measured, ms", ylabel="predicted, ms")


def _error_panel(axes: Axes, points: Sequence[MeasuredLatency], precisions: Sequence[str]) -> None:
    errors = {id(point): point.predicted_ms / point.measured_ms - 1 for point in points}
    for band, alpha in ERROR_BANDS:
        axes.axhspan(-band, band, color=GRID, linewidth=0, alpha=alpha)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for precision in precisions:
        some = [point for point in points if point.precision == precision]
        axes.scatter(
            [point.parameters / 1e6 for point in some],
            [errors[id(point)] for point in some],
            s=16,
            color=_colour(precision),
            edgecolor=PAPER,
            linewidth=0.4,
            zorder=3,
            gid=f"errors-{precision}",
        )
    reach = 1.1 * max(map(abs, [*errors.values(), ERROR_BANDS[0][0]]))
    axes.set(xlabel="parameters, millions", ylabel="predicted over measured", ylim=(-reach, reach))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.0f} %" if value else "0"))


def _curves_panel(axes: Axes, curves: Sequence[LatencyCurve], styles: Mapping[int, Any]) -> None:
    # logarithmic, and yet with room for a context of 0
    axes.set_xscale("function", functions=(lambda x: np.log2(x + TOKENS_AT_ZERO), lambda y: 2**y - TOKENS_AT_ZERO))
    for curve in curves:
        colour = _colour(curve.precision)
        tokens, values_ms = zip(*curve.predicted, strict=True)
        axes.plot(tokens, values_ms, color=colour, linewidth=1.2, linestyle=styles[curve.batch_size], gid="predicted")
        tokens, values_ms = zip(*curve.measured, strict=True)
        axes.scatter(
            tokens,
            values_ms,
            s=16,
            color=colour,
            edgecolor=PAPER,
            linewidth=0.4,
            zorder=3,
            gid=f"curves-{curve.precision}",
        )
    _log_axis(axes, "y", [ms for curve in curves for _, ms in (*curve.predicted, *curve.measured)])
    axes.xaxis.set_major_locator(FixedLocator(sorted({tokens for curve in curves for tokens, _ in curve.measured})))
    prompt = curves[0].phase == "prefill"
    axes.set(xlabel="prompt tokens" if prompt else "context tokens", ylabel="TTFT, ms" if prompt else "TPOT, ms")


def _identity(axes: Axes, values: Iterable[float]) -> None:
    """Equal log axes with the line where prediction and truth agree, and 10 % to either side."""
    values = [value for value in values if value > 0]
    _log_axis(axes, "x", values)
    _log_axis(axes, "y", values)
    line = np.array(axes.get_xlim())
    axes.fill_between(line, 0.9 * line, 1.1 * line, color=GRID, linewidth=0, alpha=0.7)
    axes.plot(line, line, color=MUTED, linewidth=0.8)
    axes.set_aspect("equal")


def _time_axis(axes: Axes, values: Sequence[float]) -> None:
    """Linear, or logarithmic where the slowest takes more than four times as long as the fastest."""
    if max(values) > 4 * min(values):
        _log_axis(axes, "x", values)
    else:
        room = 0.08 * (max(values) - min(values) or max(values))
        axes.set_xlim(min(values) - room, max(values) + room)


def _log_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float], margin: float = 0.06) -> None:
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


def _above_zero(values: Iterable[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values for a log axis: 0 (the full model's KL) is drawn at a third of the least above it."""
    array = np.array(list(values), dtype=np.float64)
    floor = array[array > 0].min(initial=1.0) / 3 if (array <= 0).any() else 0.0
    return np.maximum(array, floor)


def _distinct(values: Iterable[T]) -> list[T]:
    """The distinct values in order of first appearance."""
    return list(dict.fromkeys(values))
