"""``report.json`` on disk, and its text forms: terminal tables, Markdown and JUnit XML."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from headwise.artifacts import write_atomic
from headwise.errors import DataError
from headwise.pipeline.report import summary
from headwise.pipeline.report.head_maps import head_maps
from headwise.pipeline.report.html import html
from headwise.pipeline.report.matrix_tables import MatrixTable, matrix_tables
from headwise.pipeline.report.neuron_tables import NeuronTable, neuron_tables
from headwise.pipeline.report.summary import COSTS, Report, Stage

SCHEMA = "headwise.report/1"
REPORT = "report.json"

STYLES = {
    **dict.fromkeys(("pass", "passed", "PASS"), "green"),
    **dict.fromkeys(("fail", "failed", "error", "FAIL"), "bold red"),
    **dict.fromkeys(("warn", "warned", "rolled-back", "interrupted", "INCONCLUSIVE"), "yellow"),
    "ANOMALOUS": "magenta",
}


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished or interrupted run.

    Raises:
        DataError: ``folder`` holds no report, or one that this version cannot read.
    """
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"no {REPORT} in {folder}",
            expected="the folder that headwise compress was given as --out",
            fix="name that folder, or run headwise compress first",
        ) from error
    except ValueError as error:
        raise _unreadable(path, f"is not JSON ({error})") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise _unreadable(path, f'has the schema "{schema}"')
    assert isinstance(report, dict)
    return report


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} {why}",
        expected=f'a report with the schema "{SCHEMA}"',
        fix="run headwise compress again: finished stages are kept, and the report is written anew",
    )


def write_json(report: Report, folder: Path) -> None:
    """Write ``report.json``, which takes no time; a run does it after every stage.

    Numbers that JSON does not know (NaN, infinity) are written as null.

    Raises:
        StorageError: the folder cannot be written.
    """
    write_atomic(folder / REPORT, json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json``, ``report.html``, ``report.md`` and ``report.xml`` (JUnit), which takes about a second.

    Raises:
        StorageError: the folder cannot be written.
    """
    write_json(report, folder)
    report = _finite(report)
    for name, render in (("report.html", html), ("report.md", markdown), ("report.xml", junit)):
        write_atomic(folder / name, render(report))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def terminal(report: Report) -> RenderableType:
    """The report for a terminal, readable from 80 columns on."""
    outcome = report["outcome"]
    title = Text.assemble((outcome.upper(), STYLES.get(outcome, "bold")), f" (exit {report['exit_code']})")
    headline = Text(f"{report['reason']}\n{report['checkpoint']['source']}, {summary.seconds(report['seconds'])}")
    parts: list[RenderableType] = [
        Panel(headline, title=title, title_align="left", box=box.ROUNDED),
        _accuracy_table(report),
    ]
    if summary.cost_columns(report):
        parts.append(_cost_table(report))
    parts += [Text(f"{table.stage}: {table.headline}", style="dim") for table in matrix_tables(report)]
    parts += [Text(note, style="dim") for note in summary.notes(report)]
    for stage, reason in summary.problems(report):
        parts.append(Text.assemble((f"{stage}: ", "bold"), reason))
    return Group(*parts)


def _accuracy_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Accuracy", title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("Stage", no_wrap=True)
    for heading in ("Output", "Metric"):
        table.add_column(heading, overflow="fold")
    table.add_column("Value", justify="right")
    table.add_column(Text("Drop [interval]"), justify="right", min_width=12)
    table.add_column("Limit", justify="right", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    last = ""
    for row in summary.accuracy_rows(report):
        verdict = row.verdict if row.metric else row.status
        text = Text(verdict, style=STYLES.get(verdict, "dim"))
        if row.reason and row.status in summary.GOES_ON:
            text.append(f" ({row.status})")
        stage = "" if row.stage == last else row.stage
        table.add_row(*map(_compact, (stage, row.output, row.metric, row.value, row.drop, row.limit)), text)
        last = row.stage
    return table


def _cost_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Cost", title_justify="left", title_style="bold", padding=0)
    table.add_column("Stage", overflow="fold")
    columns = summary.cost_columns(report)
    for name in columns:
        table.add_column(COSTS[name], justify="right", min_width=max(6, *map(len, COSTS[name].split())))
    table.add_column("Took", justify="right", min_width=6)
    for stage in report["stages"]:
        cells = [stage["name"], *(summary.cost_text(report, stage, name) for name in columns), _took(stage)]
        table.add_row(*map(_compact, cells))
    return table


def _compact(cell: str) -> Text:
    # rich would also break a line at a space that does not break.
    return Text(cell.replace("\N{NO-BREAK SPACE}", ""))


def _took(stage: Stage) -> str:
    return "cached" if stage.get("cached") else summary.seconds(stage.get("seconds"))


def markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    checkpoint = report["checkpoint"]
    lines = [
        f"# headwise: {report['outcome']}",
        "",
        f"{report['reason']} (exit code {report['exit_code']}, {summary.seconds(report['seconds'])})",
        "",
        f"Checkpoint: `{checkpoint['source']}` (digest `{checkpoint['digest'][:12]}`), headwise {report['headwise']}",
        "",
        "## Accuracy",
        "",
        *markdown_table(
            ("Stage", "Status", "Output", "Metric", "Value", "Drop [interval]", "Limit", "Verdict"),
            [
                (row.stage, row.status, row.output, row.metric, row.value, row.drop, row.limit, row.verdict)
                for row in summary.accuracy_rows(report)
            ],
        ),
        "A drop is the loss against the untouched model on the same samples; a negative drop is a gain.",
        "",
    ]
    lines += _markdown_cost(report) + _markdown_heads(report)
    lines += _markdown_tables("Neurons", neuron_tables(report))
    lines += _markdown_tables("Quantized matrices", matrix_tables(report)) + _markdown_engines(report)
    found = summary.problems(report)
    if found:
        lines += ["## What did not pass, or did not run", ""]
        lines += [f"- **{_escape(stage)}**: {_escape(reason)}" for stage, reason in found]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_cost(report: Report) -> list[str]:
    columns = summary.cost_columns(report)
    if not columns:
        return []
    rows = [
        (stage["name"], *(summary.cost_text(report, stage, name) for name in columns), _took(stage))
        for stage in report["stages"]
    ]
    table = markdown_table(("Stage", *(COSTS[name] for name in columns), "Took"), rows)
    notes = [line for note in summary.notes(report) for line in (f"{note}.", "")]
    return ["## Cost", "", *table, *notes]


def _markdown_heads(report: Report) -> list[str]:
    lines = []
    for heads in head_maps(report):
        rows = [
            (layer, len(old), len(new), change)
            for layer, (old, new, change) in enumerate(zip(heads.before, heads.after, heads.changes, strict=True))
        ]
        lines += [f"## Heads: {_escape(heads.stage)}", ""]
        lines += markdown_table(("Layer", "Before", "After", "Change (original ids)"), rows)
    return lines


def _markdown_tables(title: str, tables: Sequence[MatrixTable | NeuronTable]) -> list[str]:
    lines = []
    for table in tables:
        lines += [f"## {title}: {_escape(table.stage)}", "", f"{_escape(table.headline)}.", ""]
        lines += markdown_table(table.headings, table.rows)
    return lines


def _markdown_engines(report: Report) -> list[str]:
    rows = summary.engine_rows(report)
    return ["## Engines", "", *markdown_table(summary.ENGINE_HEADINGS, rows)] if rows else []


def markdown_table(headings: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """A table as lines, with an empty one behind it."""
    lines = [" | ".join(headings), " | ".join("---" for _ in headings)]
    lines += [" | ".join(_escape(str(cell)) for cell in row) for row in rows]
    return [f"| {line} |" for line in lines] + [""]


def _escape(text: str) -> str:
    for character in "\\|*_`<[":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def junit(report: Report) -> str:
    """The report as JUnit XML: a suite per stage, in it a test case per verdict.

    FAIL, INCONCLUSIVE and ANOMALOUS are failures, except where the recipe said to go on (``on_fail: warn`` or
    ``rollback``): there the finding is printed as the case's output, so that the XML is red exactly when the exit code
    is. NOT RUN is a skipped case.
    """
    suites = ElementTree.Element("testsuites", name="headwise", time=f"{report['seconds']:.3f}")
    for stage in report["stages"]:
        cases = list(_junit_cases(stage))
        counts = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")}
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=stage["name"],
            tests=str(len(cases)),
            failures=str(counts["failure"]),
            errors=str(counts["error"]),
            skipped=str(counts["skipped"]),
            time=f"{stage.get('seconds') or 0:.3f}",
        )
        suite.extend(cases)
    return xml_text(suites)


def xml_text(root: ElementTree.Element) -> str:
    """An XML document, indented."""
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _junit_cases(stage: Stage) -> Iterator[ElementTree.Element]:
    for verdict in stage.get("verdicts") or []:
        case = _junit_case(stage, f"{verdict['gate']}: {verdict['output']} {verdict['metric']}")
        outcome, reason = verdict["outcome"], verdict.get("reason") or ""
        if outcome == "NOT RUN":
            ElementTree.SubElement(case, "skipped", message=reason)
        elif outcome != "PASS" and stage["status"] in summary.GOES_ON:
            ElementTree.SubElement(case, "system-out").text = f"{outcome}, {stage['status']}: {reason}"
        elif outcome != "PASS":
            ElementTree.SubElement(case, "failure", type=outcome, message=reason)
        yield case
    problem = {"error": "error", "interrupted": "error", "not-run": "skipped", "skipped": "skipped"}.get(
        stage["status"]
    )
    if problem == "error" or not stage.get("verdicts"):
        case = _junit_case(stage, "stage")
        reason = stage.get("reason") or ""
        if problem == "skipped":
            ElementTree.SubElement(case, "skipped", message=reason)
        elif problem:
            ElementTree.SubElement(case, "error", type=stage["status"], message=reason)
        yield case


def _junit_case(stage: Stage, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=f"headwise.{stage['name']}", name=name)
