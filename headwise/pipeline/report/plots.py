"""The figures of the HTML report, as SVG that follows the colours of the page (light and dark).

matplotlib writes fixed colours, so the figures are drawn in placeholder colours, which are then replaced by the CSS
variables of the page. Colour never stands alone: outcomes also differ in their marker, removed heads carry a cross.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from headwise.pipeline.report import summary
from headwise.pipeline.report.head_maps import HeadMap
from headwise.pipeline.report.summary import COSTS, Report

_COLORS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "accent": "#040404",
    "good": "#050505",
    "bad": "#060606",
    "unsure": "#070707",
    "odd": "#080808",
    "bad-zone": "#090909",
    "bar": "#0a0a0a",
}
_MARKERS = {"PASS": ("o", "good"), "FAIL": ("X", "bad"), "INCONCLUSIVE": ("^", "unsure"), "ANOMALOUS": ("D", "odd")}
_FONT = 9.5
_ROW = 0.36
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": _FONT,
    "text.color": _COLORS["ink"],
    "axes.labelcolor": _COLORS["muted"],
    "axes.edgecolor": _COLORS["line"],
    "xtick.color": _COLORS["muted"],
    "ytick.color": _COLORS["ink"],
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure for the page: its title, an ``<svg>`` element, and what it shows in words."""

    title: str
    svg: str
    alt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """One stage in an accuracy figure; ``low`` and ``high`` bound the value, ``limit`` is the worst one allowed."""

    stage: str
    value: float | None
    outcome: str
    low: float | None = None
    high: float | None = None
    limit: float | None = None


def accuracy_plots(report: Report) -> list[Plot]:
    """One figure per judged output and metric: the value at every stage, its interval, and the gate's limit."""
    judged: dict[tuple[str, str], None] = {}
    for stage in report["stages"]:
        for verdict in stage.get("verdicts") or []:
            judged[verdict["output"], verdict["metric"]] = None
    plots = []
    for output, metric in judged:
        facts = _metric_facts(report, output, metric)
        if facts is not None:
            points = [p for stage in report["stages"] if (p := _point(stage, output, metric, facts))]
            plots.append(_accuracy_plot(f"{output}: {metric}", points, facts))
    return plots


def _metric_facts(report: Report, output: str, metric: str) -> Mapping[str, Any] | None:
    """The first measurement of a metric that has a reference: it tells unit and direction."""
    for stage in report["stages"]:
        for found in stage.get("metrics") or []:
            if (found["output"], found["metric"]) == (output, metric) and found.get("reference") is not None:
                return dict(found)
    return None


def _point(stage: Mapping[str, Any], output: str, metric: str, facts: Mapping[str, Any]) -> _Point | None:
    def mine(entry: Mapping[str, Any]) -> bool:
        return bool((entry["output"], entry["metric"]) == (output, metric))

    measured = next(filter(mine, stage.get("metrics") or []), None)
    verdict = next(filter(mine, stage.get("verdicts") or []), None)
    value = None if measured is None else measured.get("value")
    if verdict is None:
        return None if value is None else _Point(stage=stage["name"], value=value, outcome="")
    reference = facts["reference"] if measured is None else measured["reference"]
    worse = -1.0 if facts["higher_is_better"] else 1.0
    limit = verdict.get("limit")
    low, high = verdict.get("interval") or (None, None)
    ends = sorted(reference + worse * end for end in (low, high) if end is not None)
    return _Point(
        stage=stage["name"],
        value=value,
        outcome=verdict["outcome"],
        low=ends[0] if len(ends) == 2 else None,
        high=ends[1] if len(ends) == 2 else None,
        limit=None if limit is None else reference + worse * limit,
    )


def _accuracy_plot(title: str, points: Sequence[_Point], facts: Mapping[str, Any]) -> Plot:
    reference, unit, better = facts["reference"], facts["unit"], facts["higher_is_better"]
    figure, axes = _axes([point.stage for point in points], width=6.2, top=0.33)
    known = [v for p in points for v in (p.value, p.low, p.high, p.limit) if v is not None] + [reference]
    margin = (max(known) - min(known) or abs(reference) or 1.0) * 0.12
    left, right = min(known) - margin, max(known) + margin
    axes.set_xlim(left, right)
    axes.axvline(reference, color=_COLORS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    for row, point in enumerate(points):
        if point.limit is not None:
            start, end = (left, point.limit) if better else (point.limit, right)
            axes.axhspan(
                row - 0.5, row + 0.5, *_fractions(start, end, left, right), color=_COLORS["bad-zone"], linewidth=0
            )
            axes.plot([point.limit] * 2, [row - 0.5, row + 0.5], color=_COLORS["bad"], linewidth=1.4)
        _draw_point(axes, row, point, reference)
    _note(axes, "untouched", (reference, -0.55), color="muted", ha="center", va="bottom", size=_FONT - 1)
    limit = next((p.limit for p in points if p.limit is not None), None)
    if limit is not None and abs(limit - reference) > 0.22 * (right - left):
        row = next(i for i, p in enumerate(points) if p.limit is not None)
        _note(axes, "limit", (limit, row - 0.55), color="bad", ha="center", va="bottom", size=_FONT - 1)
    axes.set_xlabel("points of 100" if unit == "points" else unit or title.rpartition(": ")[2])
    said = [f"{p.stage} {summary.number(p.value, unit)} {p.outcome}".strip() for p in points]
    return Plot(title=title, svg=_svg(figure, title), alt=f"{title} along the stages: " + ", ".join(said))


def _fractions(start: float, end: float, left: float, right: float) -> tuple[float, float]:
    return (start - left) / (right - left), (end - left) / (right - left)


def _draw_point(axes: Axes, row: int, point: _Point, reference: float) -> None:
    marker, color = _MARKERS.get(point.outcome, ("o", "ink"))
    if point.low is not None and point.high is not None:
        axes.plot([point.low, point.high], [row, row], color=_COLORS[color], linewidth=2.4, solid_capstyle="round")
    if point.value is None:
        offset = {"xytext": (6, 0), "textcoords": "offset points"}
        _note(axes, point.outcome.lower(), (reference, row), color="muted", style="italic", **offset)
    else:
        axes.plot([point.value], [row], marker, color=_COLORS[color], markersize=7, markeredgewidth=0)


def cost_plots(report: Report) -> list[Plot]:
    """One bar chart per cost that can be compared with the untouched model's."""
    plots = []
    for name in summary.cost_columns(report):
        stages = [stage for stage in report["stages"] if summary.cost(stage, name) is not None]
        if any(summary.cost_ratio(report, stage, name) is not None for stage in stages):
            plots.append(_cost_plot(report, stages, name))
    return plots


def _cost_plot(report: Report, stages: Sequence[Mapping[str, Any]], name: str) -> Plot:
    labels = [summary.cost_text(report, stage, name) for stage in stages]
    figure, axes = _axes([stage["name"] for stage in stages], width=4.1, top=0.08, right=labels)
    ratios = [summary.cost_ratio(report, stage, name) or 1.0 for stage in stages]
    axes.axvline(1.0, color=_COLORS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.barh(range(len(stages)), ratios, height=0.62, color=_COLORS["bar"], linewidth=0)
    longest = max(*ratios, 1.0)
    axes.set_xlim(0, longest * 1.04)
    axes.xaxis.set_major_locator(MultipleLocator(0.25) if longest < 1.4 else MaxNLocator(4))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("of the untouched model")
    said = ", ".join(f"{stage['name']} {ratio:.0%}" for stage, ratio in zip(stages, ratios, strict=True))
    return Plot(title=COSTS[name], svg=_svg(figure, name), alt=f"{COSTS[name]} along the stages: {said}")


def head_plot(heads: HeadMap) -> Plot:
    """All heads of all layers: the darker, the higher the score; removed heads are crossed out."""
    layers, columns = len(heads.before), heads.columns
    cell = min(0.36, 11.0 / (columns + 4))
    width, height = columns * cell + 1.2, layers * cell + 0.62
    size = min(_FONT, cell * 28)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0.6 / width, 0.56 / height, columns * cell / width, layers * cell / height))
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(layers - 0.5, -0.5), xlabel="head (original id)", ylabel="layer")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0, labelsize=size)
        step = math.ceil(max(columns, layers) / 32)
        axes.set_xticks(range(0, columns, step))
        axes.set_yticks(range(0, layers, step))
        shade = _shades(heads)
        for layer, (before, after) in enumerate(zip(heads.before, heads.after, strict=True)):
            for head in before:
                _draw_head(axes, (layer, head), shade(heads.scores[layer].get(head)), head not in after, cell)
                if head in heads.uses[layer]:
                    _note(axes, str(heads.uses[layer][head]), (head, layer), ha="center", size=0.8 * size)
            _note(axes, f"{len(after)}/{len(before)}", (columns - 0.3, layer), color="muted", size=size)
    said = ". ".join(f"Layer {index}: {change}" for index, change in enumerate(heads.changes))
    return Plot(title=heads.stage, svg=_svg(figure, heads.stage), alt=said)


def _shades(heads: HeadMap) -> Any:
    """Score -> opacity. Scores over several decades are shaded by their logarithm, or all but one would be white."""
    values = [score for layer in heads.scores for score in layer.values() if math.isfinite(score)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    wide = low > 0 and high / low > 50
    scale = math.log if wide else float

    def shade(score: float | None) -> float:
        if score is None or not math.isfinite(score) or high <= low:
            return 0.3
        return 0.06 + 0.94 * (scale(score) - scale(low)) / (scale(high) - scale(low))

    return shade


def _draw_head(axes: Axes, place: tuple[int, int], shade: float, removed: bool, cell: float) -> None:
    layer, head = place
    corner = (head - 0.42, layer - 0.42)
    axes.add_patch(Rectangle(corner, 0.84, 0.84, linewidth=0, facecolor=_COLORS["accent"], alpha=shade))
    edge = _COLORS["bad" if removed else "line"]
    axes.add_patch(Rectangle(corner, 0.84, 0.84, fill=False, edgecolor=edge, linewidth=1.3 if removed else 0.6))
    if removed:
        arm = 0.24
        for sign in (1, -1):
            xs, ys = [head - arm, head + arm], [layer - sign * arm, layer + sign * arm]
            axes.plot(xs, ys, color=_COLORS["bad"], linewidth=max(0.8, cell * 5), solid_capstyle="round")


def _axes(names: Sequence[str], *, width: float, top: float, right: Sequence[str] = ("",)) -> tuple[Figure, Axes]:
    """A figure with a named row per stage, the first one on top, and texts to their right; sizes in inches."""
    character = _FONT * 0.0081
    left, margin = (0.2 + character * max(map(len, texts)) for texts in (names, right))
    height = len(names) * _ROW + 0.52 + top
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes(
            (left / width, 0.52 / height, (width - left - margin) / width, len(names) * _ROW / height)
        )
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", color=_COLORS["line"], linewidth=0.6)
        axes.set_axisbelow(True)
        for row, text in enumerate(right):
            _note(axes, text, (1.0, row), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points")
    return figure, axes


def _note(axes: Axes, text: str, place: tuple[float, float], *, color: str = "ink", **style: Any) -> None:
    """A text that may stand outside the axes; matplotlib would leave it out there."""
    axes.annotate(text, place, **{"va": "center", "color": _COLORS[color], "annotation_clip": False, **style})


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an ``<svg>`` element in the page's colours, the same bytes every time."""
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, color in _COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text
