import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hw_profiles.shapes import PRECISIONS
from nas.latency import LatencyCurve
from nas.plot_style import DARK_COLOURS, LIGHT_COLOURS, MIXED, colour_of
from nas.report import (
    FileRow,
    LatencyError,
    MeasuredLatency,
    ModelRow,
    ReportData,
    TrialPoint,
    number,
    write_report,
)
from nas.report_plots import (
    curves_figure,
    error_figure,
    latency_figure,
    layers_figure,
    pareto_figure,
    quality_figure,
    save_figure,
)
from nas.subnet import LayerChoice, Subnet

HOSTILE = "<script>alert('$x_1^2$')</script> & \"co\""
VOID_ELEMENTS = {"meta", "br"}


class Page(HTMLParser):
    """What is on the page: tags, ids, all text; every element that is opened must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID_ELEMENTS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def random_trials(count: int, seed: int = 0) -> list[TrialPoint]:
    rng = np.random.default_rng(seed)
    roles = ("seed", "search", "baseline", "somebody's")
    return [
        TrialPoint(
            f"{i:010x}",
            int(rng.choice([8, 4])),
            kl := float(rng.lognormal()),
            17 * math.exp(kl),
            rng.uniform(3, 9),
            roles[i % 4],
        )
        for i in range(count)
    ]


def curves() -> list[LatencyCurve]:
    """Decode from an empty cache on, at two batch sizes."""
    return [
        LatencyCurve(
            "openvino", "decode", precision, batch, ((0, ms), (60, ms + 1), (512, ms + 3)), ((0, ms), (512, ms + 3.1))
        )
        for precision, ms in (("int8", 9.0), ("int4", 7.0))
        for batch in (1, 4)
    ]


@pytest.fixture
def full() -> Subnet:
    return Subnet((LayerChoice(3, 1536),) * 4, 8)


@pytest.fixture
def data(full: Subnet) -> ReportData:
    chosen = Subnet((LayerChoice(3, 0), LayerChoice(0, 768), LayerChoice(1, 1536), LayerChoice(0, 0)), 4)
    trials = [*random_trials(30), TrialPoint("f32", 32, 0.0, 17.0, 26.9, "full")]
    latency = [
        MeasuredLatency(runtime, phase, "int8", 5.0 + i, 4.5 + i, 5.6 + i, 5.1 + i, 10**6 * (40 + i))
        for runtime in ("openvino", "onnxruntime")
        for phase in ("prefill", "decode")
        for i in range(5)
    ]
    file = FileRow(83_000_000, 71.0, 5.12, 2e-5, "Paris <b>is</b> the capital.")
    return ReportData(
        title="SmolLM2-135M here",
        model="SmolLM2-135M-Instruct",
        device="a device",
        runtime="openvino",
        precision="int4",
        full=full,
        budget_tpot_ms=5.25,
        trials=trials,
        chosen=chosen,
        chosen_id=trials[7].subnet_id,
        chosen_predicted=(5.1, 5.0, 5.2),
        latency=latency,
        latency_curves=curves(),
        latency_errors=[LatencyError("openvino", "decode", 0.031, 0.82, 0.99, 0.994, 0.077, 0.95, None, 50)],
        quality=[(0.1, 0.12), (0.4, 0.37), (1.2, 1.3)],
        quality_spearman=0.987,
        additive_spearman=0.971,
        models=[ModelRow("full model, int8", 134_515_008, 8, 17.4, {"openvino": file, "onnx": file})],
        steps_seconds={"profile": 312.4, "search": 820.1},
        notes=["Two cores were shared."],
    )


def page(data: ReportData, folder: Path) -> tuple[str, Page]:
    html = write_report(data, folder / "report.html").read_text()
    return html, Page(html)


def markers(figure: Figure, prefix: str) -> npt.NDArray[np.float64]:
    """Positions of all scattered points whose gid begins with `prefix`."""
    found = [c for axes in figure.axes for c in axes.collections if str(c.get_gid()).startswith(prefix)]
    return np.concatenate([np.asarray(collection.get_offsets()) for collection in found])


def line(axes: Axes, gid: str) -> npt.NDArray[np.float64]:
    return next(np.column_stack(line.get_data()) for line in axes.lines if line.get_gid() == gid)


def test_page_is_whole_and_shows_every_trial_and_figure_given(data: ReportData, tmp_path: Path) -> None:
    html, parsed = page(data, tmp_path)
    assert all(html.count(f">{trial.subnet_id}<") >= 1 for trial in data.trials)
    assert parsed.tags.count("svg") == 6
    for shown in ("5.25 ms", "5.00 to 5.20 ms", "3.1 %", "0.994", "0.987", "0.971", "83.0 MB", "134.5 M", "820"):
        assert shown in parsed.text
    assert "meet the budget, the upper end of its interval included" in parsed.text
    assert parsed.text.count("Paris <b>is</b> the capital.") == 2
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html)) <= set(parsed.ids)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("predicted", "verdict"),
    [((5.1, 5.0, 5.3), "its interval reaches beyond it"), ((5.3, 5.2, 5.4), "predicted to miss the budget")],
)
def test_verdict_follows_the_interval(
    data: ReportData, tmp_path: Path, predicted: tuple[float, float, float], verdict: str
) -> None:
    data = replace(data, chosen_predicted=predicted, trials=(), chosen=None, latency=(), latency_curves=(), quality=())
    assert verdict in page(data, tmp_path)[1].text


def test_page_loads_nothing(data: ReportData, tmp_path: Path) -> None:
    html, parsed = page(data, tmp_path)
    assert not re.search(r"https?://|//[a-z]|@import|src=", html)
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_hostile_text_stays_text(data: ReportData, tmp_path: Path) -> None:
    latency = [replace(row, runtime=HOSTILE, precision=HOSTILE) for row in data.latency]
    trials = [replace(trial, role=HOSTILE, subnet_id=HOSTILE) for trial in data.trials]
    hostile = replace(
        data, title=HOSTILE, model=HOSTILE, device=HOSTILE, notes=[HOSTILE], latency=latency, trials=trials,
        chosen_id=HOSTILE, steps_seconds={HOSTILE: 1.0},
    )  # fmt: skip
    html, parsed = page(hostile, tmp_path)
    assert "<script" not in html
    assert "script" not in parsed.tags
    assert parsed.text.count(HOSTILE) >= 5 + len(trials)


def test_page_of_nothing_has_no_empty_sections(full: Subnet, tmp_path: Path) -> None:
    empty = ReportData("A title", "a model", "a device", "openvino", "int8", full)
    _, parsed = page(empty, tmp_path)
    assert "A title" in parsed.text
    assert not {"section", "svg", "table"} & set(parsed.tags)


def test_same_data_gives_the_same_page(data: ReportData, tmp_path: Path) -> None:
    data = replace(data, latency=(), latency_curves=(), quality=())
    assert page(data, tmp_path)[0] == page(data, tmp_path / "again")[0]


def test_a_report_that_cannot_be_drawn_leaves_the_old_one(data: ReportData, tmp_path: Path) -> None:
    data = replace(data, trials=(), latency=(), latency_curves=(), quality=())
    html, _ = page(data, tmp_path)
    with pytest.raises(ValueError, match="shorter"):
        write_report(replace(data, full=Subnet(data.full.layers[:3], 8)), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == html


def test_a_file_that_is_no_report_is_not_overwritten(data: ReportData, tmp_path: Path) -> None:
    (tmp_path / "llm-nas.db").write_bytes(b"SQLite format 3\0 and weeks of measurements")
    for path in (tmp_path / "llm-nas.db", tmp_path):
        with pytest.raises(ValueError, match="wanted the name of a new file, or of an earlier report, got"):
            write_report(data, path)
    assert (tmp_path / "llm-nas.db").read_bytes().endswith(b"weeks of measurements")


def test_every_precision_has_a_colour_of_its_own() -> None:
    for colours in (LIGHT_COLOURS, DARK_COLOURS):
        assert len({colours[name] for name in (*PRECISIONS, MIXED)}) == len(PRECISIONS) + 1
    assert [colour_of(name) for name in (*PRECISIONS, MIXED)] == [LIGHT_COLOURS[n] for n in (*PRECISIONS, MIXED)]
    assert colour_of("3 bits") == LIGHT_COLOURS["muted"]


def test_pareto_figure_draws_each_trial_once_and_the_brute_force_front(data: ReportData) -> None:
    trials = random_trials(120, seed=1)
    figure = pareto_figure(replace(data, trials=trials, chosen_id=trials[3].subnet_id))
    points = np.array([(trial.tpot_ms, trial.kl) for trial in trials])
    drawn = markers(figure, "trials-")
    assert np.array_equal(drawn[np.lexsort(drawn.T)], points[np.lexsort(points.T)])
    best = [p for p in points if not any((q <= p).all() and (q < p).any() for q in points)]
    axes = figure.axes[0]
    assert np.array_equal(line(axes, "front"), sorted(map(tuple, best)))
    assert set(line(axes, "budget")[:, 0]) == {5.25}
    assert line(axes, "chosen").tolist() == [[trials[3].tpot_ms, trials[3].kl]]


def test_pareto_figure_finds_room_for_a_kl_of_zero(data: ReportData) -> None:
    axes = pareto_figure(data).axes[0]
    (_, drawn_kl), *_ = markers(axes.get_figure(), "trials-full")
    assert axes.get_ylim()[0] < drawn_kl < min(trial.kl for trial in data.trials if trial.kl > 0)
    assert "full, fp32, KL 0" in [text.get_text() for text in axes.texts]


def test_layers_figure_has_what_is_kept_and_marks_what_is_skipped(data: ReportData) -> None:
    assert data.chosen
    groups, widths = layers_figure(data.chosen, data.full, 3).axes
    for axes, kept, skipped in ((groups, [3, 0, 1, 0], [1, 3]), (widths, [0, 768, 1536, 0], [0, 3])):
        assert [bar.get_height() for bar in axes.patches[4:]] == kept
        assert line(axes, "skipped")[:, 0].tolist() == skipped


def test_where_kv_groups_keep_fewer_query_heads_those_are_drawn(data: ReportData, tmp_path: Path) -> None:
    chosen = Subnet((LayerChoice(3, 0, heads_per_group=1), LayerChoice(0, 768), LayerChoice(2, 1536)), 4)
    full = replace(data.full, layers=data.full.layers[:3])
    attention, _ = layers_figure(chosen, full, 3).axes
    assert attention.get_title(loc="left") == "attention: query heads"
    assert [bar.get_height() for bar in attention.patches] == [9, 9, 9, 3, 0, 6]
    html, _ = page(replace(data, chosen=chosen, full=full, heads_per_group=3), tmp_path)
    assert "55.6 % of the KV groups, 33.3 % of the query heads and" in html
    assert "query heads" not in page(data, tmp_path)[0]


def test_prediction_figures_draw_predicted_over_measured(data: ReportData) -> None:
    figure = latency_figure(data.latency)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "openvino, prefill",
        "openvino, decode",
        "onnxruntime, prefill",
        "onnxruntime, decode",
    ]
    assert markers(figure, "latency-").tolist() == [[row.measured_ms, row.predicted_ms] for row in data.latency]
    assert markers(quality_figure(data.quality), "quality").tolist() == [[m, p] for p, m in data.quality]


def test_error_figure_draws_relative_errors_over_size(data: ReportData) -> None:
    drawn = markers(error_figure(data.latency), "errors-")
    expected = [[row.parameters / 1e6, row.predicted_ms / row.measured_ms - 1] for row in data.latency]
    assert drawn.tolist() == expected
    axes = error_figure([replace(data.latency[0], predicted_ms=7.65)]).axes[0]  # half too much
    assert axes.get_ylim() == pytest.approx((-0.55, 0.55))


def test_curves_figure_draws_lines_and_marks_what_was_measured(data: ReportData) -> None:
    figure = curves_figure(data.latency_curves)
    (axes,) = figure.axes
    lines = [np.column_stack(line.get_data()).tolist() for line in axes.lines]
    assert lines == [[list(point) for point in curve.predicted] for curve in data.latency_curves]
    assert markers(figure, "curves-int4").tolist() == [[0, 7.0], [512, 10.1]] * 2
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()  # batch 1 and 4
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "int8",
        "int4",
        "measured",
        "batch 1",
        "batch 4",
    ]
    left, right = axes.transData.transform([(0, 7.0), (512, 7.0)])[:, 0]
    assert np.isfinite([left, right]).all()
    assert left < right


def test_figures_can_be_saved_alone(data: ReportData, tmp_path: Path) -> None:
    path = save_figure(pareto_figure(data), tmp_path / "pareto.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_number_has_three_significant_digits() -> None:
    values = [9.4, 0.01234, 252.4, 1234.5, 2.1e-5, 0.0, None, float("nan")]
    assert [number(value) for value in values] == ["9.40", "0.0123", "252", "1,234", "2.1e-05", "0", "–", "–"]
