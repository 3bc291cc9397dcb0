"""One search, written up as one self-contained HTML page: no network, no JavaScript, light and dark.

Errors and fractions are plain ratios: 0.03 is 3 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nas.latency import LatencyCurve
from nas.pareto import pareto_front
from nas.plot_style import DARK_COLOURS, LIGHT_COLOURS, MIXED
from nas.report_plots import (
    curves_figure,
    error_figure,
    inline_svg,
    latency_figure,
    layers_figure,
    pareto_figure,
    precision_name,
    quality_figure,
)
from nas.subnet import Subnet


@dataclass(frozen=True)
class TrialPoint:
    """A subnet with its measured quality. `role` is what put it there: "search", "seed", "baseline", "full", ..."""

    subnet_id: str
    bits: int
    kl: float
    perplexity: float
    tpot_ms: float
    role: str
    is_mixed: bool = False

    @property
    def precision(self) -> str:
        return MIXED if self.is_mixed else precision_name(self.bits)


@dataclass(frozen=True)
class MeasuredLatency:
    """A graph that no predictor was fitted on: the prediction, its interval from low to high, and the truth."""

    runtime: str
    phase: str
    precision: str
    predicted_ms: float
    low_ms: float
    high_ms: float
    measured_ms: float
    parameters: int


@dataclass(frozen=True)
class LatencyError:
    """How far predictions are off on `samples` held-out graphs, beside the simpler predictors and the noise floor."""

    runtime: str
    phase: str
    mape: float
    within_5: float
    within_10: float
    spearman: float
    additive_mape: float | None
    flops_spearman: float
    repeat_noise: float | None
    samples: int


@dataclass(frozen=True)
class FileRow:
    """One exported file as its own runtime ran it; the logits differ from torch's by at most `max_logit_difference`."""

    size_bytes: int
    ttft_ms: float
    tpot_ms: float
    max_logit_difference: float
    generated: str


@dataclass(frozen=True)
class ModelRow:
    """A model that was exported, e.g. "full model, int8" or "chosen subnet"; `files` by format."""

    name: str
    parameters: int
    bits: int
    perplexity: float
    files: Mapping[str, FileRow]


@dataclass(frozen=True)
class ReportData:
    """All that a report shows. What is empty or None is left out of it."""

    title: str
    model: str
    device: str
    runtime: str
    precision: str
    full: Subnet
    """The model's own sizes, against which the chosen subnet's are drawn."""
    heads_per_group: int = 1
    """Query heads of each KV group of the full model."""
    budget_tpot_ms: float | None = None
    trials: Sequence[TrialPoint] = ()
    chosen: Subnet | None = None
    chosen_id: str | None = None
    chosen_predicted: tuple[float, float, float] | None = None
    """The chosen subnet's TPOT in ms and its interval: value, low, high."""
    latency: Sequence[MeasuredLatency] = ()
    latency_errors: Sequence[LatencyError] = ()
    latency_curves: Sequence[LatencyCurve] = ()
    quality: Sequence[tuple[float, float]] = ()
    """KL of held-out trials: predicted, measured."""
    quality_spearman: float | None = None
    additive_spearman: float | None = None
    """Rank correlation of the sum of single-block scores alone, the baseline of `quality_spearman`."""
    models: Sequence[ModelRow] = ()
    steps_seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def chosen_trial(self) -> TrialPoint | None:
        return next((trial for trial in self.trials if trial.subnet_id == self.chosen_id), None)

    @property
    def full_trial(self) -> TrialPoint | None:
        """The full model at the most bits that was tried."""
        return max((trial for trial in self.trials if trial.role == "full"), key=lambda t: t.bits, default=None)


def _is_page(path: Path) -> bool:
    """Whether a file is empty or begins as reports do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(100).lstrip().lower()
    return not beginning or beginning.startswith(b"<!doctype html")


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page at `path`: whole or not at all. ValueError where another file, or a folder, is there."""
    if path.exists() and not _is_page(path):
        raise ValueError(f"wanted the name of a new file, or of an earlier report, got {path}; give another --output")
    html = render(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(html, encoding="utf-8")
    return part.replace(path)


def render(data: ReportData) -> str:
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, size=size, millions=millions, precision=precision_name)
    figures = {}
    if data.trials:
        figures["pareto"] = pareto_figure(data)
    if data.chosen:
        figures["layers"] = layers_figure(data.chosen, data.full, data.heads_per_group)
    if data.latency:
        figures["latency"] = latency_figure(data.latency)
        figures["errors"] = error_figure(data.latency)
    if data.latency_curves:
        figures["curves"] = curves_figure(data.latency_curves)
    if data.quality:
        figures["quality"] = quality_figure(data.quality)
    return environment.get_template("report.html.jinja").render(
        data=data,
        front={int(index) for index in pareto_front([(trial.tpot_ms, trial.kl) for trial in data.trials])},
        indexed_trials=sorted(enumerate(data.trials), key=lambda pair: pair[1].tpot_ms),
        kept=kept(data.chosen, data.full, data.heads_per_group) if data.chosen else None,
        plots={name: Markup(inline_svg(figure, name)) for name, figure in figures.items()},
        colours={"light": LIGHT_COLOURS, "dark": DARK_COLOURS},
    )


@dataclass(frozen=True)
class Kept:
    """What a subnet keeps of the full model."""

    groups: float
    query_heads: float
    widths: float
    attention_skipped: int
    mlp_skipped: int


def kept(subnet: Subnet, full: Subnet, heads_per_group: int) -> Kept:
    groups = sum(layer.num_key_value_heads for layer in full.layers)
    heads = sum(layer.query_heads(heads_per_group) for layer in subnet.layers)
    return Kept(
        groups=sum(layer.num_key_value_heads for layer in subnet.layers) / groups,
        query_heads=heads / (groups * heads_per_group),
        widths=sum(layer.intermediate_size for layer in subnet.layers)
        / sum(layer.intermediate_size for layer in full.layers),
        attention_skipped=sum(layer.num_key_value_heads == 0 for layer in subnet.layers),
        mlp_skipped=sum(layer.intermediate_size == 0 for layer in subnet.layers),
    )


def number(value: float | None) -> str:
    """Three significant digits, never fewer than the whole part has: 0.0123, 9.41, 1,234; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:.1e}" if magnitude < -4 else f"{value:,.{max(0, 2 - magnitude)}f}"


def percent(ratio: float | None) -> str:
    return "–" if ratio is None or not math.isfinite(ratio) else f"{100 * ratio:.1f} %"


def size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
