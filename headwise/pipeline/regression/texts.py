"""A comparison with a baseline as a terminal table, Markdown and JUnit XML."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Literal
from xml.etree import ElementTree

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.gates.judge import Outcome
from headwise.pipeline.regression.compare import Comparison, Finding
from headwise.pipeline.report.ci import Annotation
from headwise.pipeline.report.document import STYLES, markdown_table, xml_text
from headwise.pipeline.report.summary import ABSENT, number

_HEADINGS = ("Stage", "Output", "Metric", "Drop in baseline", "Drop now", "Change", "Limit", "Verdict")


def headline(comparison: Comparison) -> str:
    """One line: passed, or which stages and outputs did not."""
    bad = [finding for finding in comparison.findings if finding.bad and not finding.tolerated]
    if bad:
        return f"{len(bad)} of {len(comparison.findings)} checks failed: " + ", ".join(map(_name, bad))
    unrun = [finding for finding in comparison.findings if finding.unrun]
    if unrun:
        return "could not be run here, and is in the baseline: " + ", ".join(map(_name, unrun))
    warned = [finding for finding in comparison.findings if finding.bad]
    if warned:
        return "failed, of which the gate of the baseline only warns: " + ", ".join(map(_name, warned))
    return "within the limits of the baseline"


def problems(comparison: Comparison) -> Iterator[tuple[Finding, str]]:
    """Every finding that is not simply a pass, with its reason in words."""
    for finding in comparison.findings:
        if finding.verdict is not None and finding.verdict.outcome is not Outcome.PASS:
            yield finding, f"{finding.verdict.outcome}, {finding.verdict.reason}" + _moved(finding)


def as_annotations(comparison: Comparison) -> list[Annotation]:
    """One for every finding that is not simply a pass."""
    return [
        Annotation(level=_level(finding), title=f"headwise check: {_name(finding)}", text=reason)
        for finding, reason in problems(comparison)
    ]


def _level(finding: Finding) -> Literal["error", "warning", "notice"]:
    if finding.bad:
        return "warning" if finding.tolerated else "error"
    return "error" if finding.unrun else "notice"


def table(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal, readable from 80 columns on."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in _HEADINGS:
        right = heading in ("Drop in baseline", "Drop now", "Change", "Limit")
        shown.add_column(heading, justify="right" if right else "left", overflow="fold")
    last = ""
    for row in map(_row, comparison.findings):
        verdict = Text(row[-1], style=STYLES.get(row[-1].split()[0], "dim"))
        shown.add_row("" if row[0] == last else row[0], *row[1:-1], verdict)
        last = row[0]
    reasons = [Text.assemble((f"{_name(finding)}: ", "bold"), reason) for finding, reason in problems(comparison)]
    style = "green" if comparison.exit_code == 0 else "bold red"
    return Group(shown, *reasons, Text(headline(comparison), style=style))


def markdown(comparison: Comparison) -> str:
    """The comparison as GitHub-flavoured Markdown."""
    outcome = "passed" if comparison.exit_code == 0 else "failed"
    lines = [f"# headwise check: {outcome}", "", headline(comparison), ""]
    lines += markdown_table(_HEADINGS, [_row(finding) for finding in comparison.findings])
    reasons = [f"- **{_name(finding)}**: {reason}" for finding, reason in problems(comparison)]
    return "\n".join([*lines, *reasons]).rstrip() + "\n"


def junit(comparison: Comparison) -> str:
    """The comparison as JUnit XML: a suite per stage, a test case per verdict; red exactly when the exit code is 1."""
    suites = ElementTree.Element("testsuites", name="headwise check")
    judged = [finding for finding in comparison.findings if finding.verdict is not None]
    for stage, findings in groupby(judged, key=lambda finding: finding.stage):
        suite = ElementTree.SubElement(suites, "testsuite", name=stage)
        for finding in findings:
            suite.append(_case(finding))
        for kind in ("failure", "skipped"):
            count = sum(case.find(kind) is not None for case in suite)
            suite.set("failures" if kind == "failure" else kind, str(count))
        suite.set("tests", str(len(suite)))
    return xml_text(suites)


def _case(finding: Finding) -> ElementTree.Element:
    verdict = finding.verdict
    assert verdict is not None, "only what was judged is a test case"
    name = f"{finding.output} {finding.metric}".strip() or "stage"
    case = ElementTree.Element("testcase", classname=f"headwise.{finding.stage}", name=name)
    message = verdict.reason + _moved(finding)
    if verdict.outcome is Outcome.NOT_RUN:
        ElementTree.SubElement(case, "skipped", message=message)
    elif finding.bad and finding.tolerated:
        ElementTree.SubElement(case, "system-out").text = f"{verdict.outcome}, warned: {message}"
    elif finding.bad:
        ElementTree.SubElement(case, "failure", type=verdict.outcome, message=message)
    return case


def _row(finding: Finding) -> tuple[str, ...]:
    verdict = finding.verdict
    outcome = ABSENT if verdict is None else str(verdict.outcome) + " (warned)" * (finding.bad and finding.tolerated)
    limit = ABSENT if verdict is None else number(verdict.limit, finding.unit)
    drops = (number(value, finding.unit) for value in (finding.was, finding.now, finding.change))
    return (finding.stage, finding.output or ABSENT, finding.metric or ABSENT, *drops, limit, outcome)


def _name(finding: Finding) -> str:
    return " ".join(part for part in (finding.stage, finding.output, finding.metric) if part)


def _moved(finding: Finding) -> str:
    """The drop in the baseline beside that of now, where both are known."""
    if finding.change is None:
        return ""
    return (
        f"; the drop was {number(finding.was, finding.unit)} in the baseline, now {number(finding.now, finding.unit)}"
    )
