"""The report's figures, each a plain `Figure` that can also be saved on its own."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from hw_profiles.shapes import BLOCK_BITS
from nas.latency import LatencyCurve
from nas.pareto import pareto_front
from nas.plot_style import (
    ERROR_BANDS,
    GRID,
    HOLLOW_ROLES,
    INK,
    LABEL_BOX,
    LIGHT_COLOURS,
    LINE_STYLES,
    MIXED,
    MUTED,
    OTHER_ROLE,
    PAPER,
    ROLES,
    STYLE,
    TOKENS_AT_ZERO,
    WIDTH_INCHES,
    colour_of,
    identity_axes,
    log_axis,
    time_axis,
)
from nas.subnet import Subnet

if TYPE_CHECKING:
    from nas.report import MeasuredLatency, ReportData, TrialPoint

T = TypeVar("T")
P = TypeVar("P", "MeasuredLatency", LatencyCurve)


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
        time_axis(axes, [*tpot_ms, *budget_ms, *interval_ms])
        log_axis(axes, "y", kl, margin=0.1)

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
                    colour = colour_of(precision)
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


def layers_figure(subnet: Subnet, full: Subnet, heads_per_group: int) -> Figure:
    """What each layer keeps, over what it has in the full model: attention above, FFN width below.

    Attention in KV groups or, where some of these keep fewer, in query heads.
    """
    by_head = any(layer.heads_per_group for layer in subnet.layers)
    pairs = list(zip(subnet.layers, full.layers, strict=True))
    colour = colour_of(subnet.precision)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.3), layout="constrained")
        attention, widths = figure.subplots(2, 1, sharex=True)
        counts = [[layer.query_heads(heads_per_group if by_head else 1) for layer in pair] for pair in pairs]
        _kept_bars(attention, counts, colour)
        _kept_bars(widths, [(kept.intermediate_size, whole.intermediate_size) for kept, whole in pairs], colour)
        most = max(whole for _, whole in counts)
        for boundary in range(1, most if most <= 16 else 0):
            attention.axhline(boundary, color=PAPER, linewidth=1)
        attention.set_title("attention: query heads" if by_head else "attention: KV groups")
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
        identity_axes(axes, [*predicted, *measured])
        axes.scatter(measured, predicted, s=20, color=colour_of("int8"), edgecolor=PAPER, linewidth=0.5, gid="quality")
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


def _mark_chosen(
    axes: Axes, x: float, y: float, trial: TrialPoint, predicted: tuple[float, float, float] | None
) -> None:
    if predicted:
        axes.hlines(y, predicted[1], predicted[2], color=INK, linewidth=2, zorder=2.8, gid="interval")
    colour = colour_of(trial.precision)
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
        Line2D([], [], linestyle="", marker="o", color=colour_of(precision), label=precision)
        for precision in (*BLOCK_BITS, MIXED)
        if precision in {trial.precision for trial in data.trials}
    ]
    for role in _distinct(trial.role for trial in data.trials):
        face = "none" if role in HOLLOW_ROLES else MUTED
        marker = ROLES.get(role, OTHER_ROLE)[0]
        handles.append(Line2D([], [], linestyle="", marker=marker, color=MUTED, markerfacecolor=face, label=role))
    return [*handles, Line2D([], [], color=INK, linewidth=1.1, label="Pareto front")]


def _kept_bars(axes: Axes, sizes: Sequence[Sequence[int]], colour: str) -> None:
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
            Line2D([], [], linestyle="", marker="o", color=colour_of(name), label=name) for name in precisions
        ]
        legend += handles
        figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 6))
    return figure


def _latency_panel(axes: Axes, points: Sequence[MeasuredLatency], precisions: Sequence[str]) -> None:
    identity_axes(axes, [value for point in points for value in (point.measured_ms, point.low_ms, point.high_ms)])
    for precision in precisions:
        some = [point for point in points if point.precision == precision]
        measured = [point.measured_ms for point in some]
        lows, highs = [point.low_ms for point in some], [point.high_ms for point in some]
        axes.vlines(measured, lows, highs, color=colour_of(precision), linewidth=0.9, alpha=0.6)
        axes.scatter(
            measured,
            [point.predicted_ms for point in some],
            s=16,
            color=colour_of(precision),
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
            color=colour_of(precision),
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
        colour = colour_of(curve.precision)
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
    log_axis(axes, "y", [ms for curve in curves for _, ms in (*curve.predicted, *curve.measured)])
    axes.xaxis.set_major_locator(FixedLocator(sorted({tokens for curve in curves for tokens, _ in curve.measured})))
    prompt = curves[0].phase == "prefill"
    axes.set(xlabel="prompt tokens" if prompt else "context tokens", ylabel="TTFT, ms" if prompt else "TPOT, ms")


def _above_zero(values: Iterable[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values for a log axis: 0 (the full model's KL) is drawn at a third of the least above it."""
    array = np.array(list(values), dtype=np.float64)
    floor = array[array > 0].min(initial=1.0) / 3 if (array <= 0).any() else 0.0
    return np.maximum(array, floor)


def _distinct(values: Iterable[T]) -> list[T]:
    """The distinct values in order of first appearance."""
    return list(dict.fromkeys(values))
