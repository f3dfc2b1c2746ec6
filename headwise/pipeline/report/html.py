"""The HTML page of a report: one file without any external resource, with figures that follow light and dark mode."""

from __future__ import annotations

from functools import cache

import jinja2
import yaml
from markupsafe import Markup

from headwise.pipeline.report import plots, summary
from headwise.pipeline.report.head_maps import head_maps
from headwise.pipeline.report.matrix_tables import matrix_tables
from headwise.pipeline.report.neuron_tables import neuron_tables
from headwise.pipeline.report.summary import COSTS, Report


def html(report: Report) -> str:
    """Render the report as a self-contained HTML page."""
    figures = {
        "accuracy": [_figure(plot) for plot in plots.accuracy_plots(report)],
        "cost": [_figure(plot) for plot in plots.cost_plots(report)],
    }
    heads = [(head_map, _figure(plots.head_plot(head_map))) for head_map in head_maps(report)]
    return _template().render(
        report=report,
        rows=list(summary.accuracy_rows(report)),
        figures=figures,
        heads=heads,
        tables={"Neurons": neuron_tables(report), "Quantized matrices": matrix_tables(report)},
        costs={name: COSTS[name] for name in summary.cost_columns(report)},
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
        text=summary,
    )


def _figure(plot: plots.Plot) -> dict[str, str]:
    # The SVG is our own; stage and output names inside it were escaped by matplotlib.
    return {"title": plot.title, "svg": Markup(plot.svg), "alt": plot.alt}


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("headwise.pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
