"""The report in all its forms, on one realistic run: two outputs, a gate that fails, one engine that could not run."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from headwise.errors import DataError, StorageError
from headwise.model.edits import ClusterHeads, Edit, EditPlan, ShareKV
from headwise.model.layout import Layout
from headwise.pipeline.forms import choose_form
from headwise.pipeline.report import plots, summary
from headwise.pipeline.report.document import junit, markdown, read_report, terminal, write_report
from headwise.pipeline.report.head_maps import head_maps
from headwise.pipeline.report.html import html

Report = dict[str, Any]
BASELINE = {"digit": ("accuracy", 98.55), "parity": ("f1", 98.99)}


def verdict(stage: str, output: str, outcome: str, drop: float, low: float, high: float, reason: str = "") -> Report:
    return {
        "gate": "accuracy",
        "stage": stage,
        "output": output,
        "metric": BASELINE[output][0],
        "outcome": outcome,
        "difference": drop,
        "interval": [low, high],
        "limit": 2.0,
        "samples": 899,
        "reason": reason or "within the limit",
    }


def metrics(drops: dict[str, float]) -> list[Report]:
    return [
        {
            "output": output,
            "metric": BASELINE[output][0],
            "unit": "points",
            "reference": BASELINE[output][1],
            "value": BASELINE[output][1] - drop,
            "higher_is_better": True,
            "judged": True,
        }
        for output, drop in drops.items()
    ]


def stage(name: str, kind: str, **more: Any) -> Report:
    return {
        "name": name,
        "kind": kind,
        "status": "passed",
        "cached": False,
        "why": "not there yet",
        "seconds": 3.2,
        "metrics": [],
        "verdicts": [],
        "cost": {},
        "artifacts": [],
        "reason": "",
        **more,
    }


def judged(name: str, kind: str, digit: float, parity: float, **more: Any) -> Report:
    verdicts = [
        verdict(name, "digit", "PASS", digit, digit - 0.7, digit + 0.7),
        verdict(name, "parity", "PASS", parity, parity - 0.6, parity + 0.6),
    ]
    return stage(name, kind, metrics=metrics({"digit": digit, "parity": parity}), verdicts=verdicts, **more)


def cost(parameters: int, macs: int, attention: int, size: int, ms: float) -> Report:
    latency = {
        "median_ms": ms,
        "p90_ms": ms * 1.2,
        "reference_ms": 0.62,
        "ratio": ms / 0.62,
        "device": "Xeon, 2 cores",
        "method": "median of 20 interleaved calls, input 1x1x8x8",
        "rounds": 20,
        "threads": 1,
    }
    return {
        "parameters": parameters,
        "macs": macs,
        "attention_macs": attention,
        "kv_bytes_per_token": 0,
        "file_bytes": size,
        "latency": latency,
    }


def record() -> Report:
    gone = [[1, 4], [0, 2, 3, 5], [0, 3]]
    layer = {"query": list(range(6)), "kv": list(range(6)), "head_dim": 16}
    left = [[h for h in range(6) if h not in ids] for ids in gone]
    scores = [{str(h): (0.05 if h in ids else 1.0) * (1 + h + 3 * i) for h in range(6)} for i, ids in enumerate(gone)]
    return {
        "name": "prune-heads",
        "options": {"ratio": 0.5},
        "plan": {
            "edits": [{"type": "drop-heads", "layer": i, "query": ids} for i, ids in enumerate(gone)],
            "scores": {"name": "contribution", "layers": scores},
        },
        "before": {"attention": [layer] * 3, "mlp": []},
        "after": {"attention": [{"query": ids, "kv": ids, "head_dim": 16} for ids in left], "mlp": []},
        "twin_error": 2e-7,
        "refit": [{"layer": 0, "before": 0.021, "after": 0.008}, {"layer": 2, "before": 0.11, "after": 0.034}],
    }


def engine(target: str, sm: int) -> Report:
    return {
        "target": target,
        "sm": sm,
        "runtime": "tensorrt-rtx",
        "version": "1.7.1",
        "bytes": 731_000,
        "seconds": 1.9,
        "profiles": {},
        "listing": {"layers": 21, "fused_attention": 3, "gemms": {"Half": 14}},
    }


def stages() -> list[Report]:
    not_run = "no GPU on this machine"
    unheard = [
        {**verdict("engine-sm86", o, "NOT RUN", 0, 0, 0, not_run), "difference": None, "interval": None}
        for o in BASELINE
    ]
    return [
        stage(
            "baseline",
            "baseline",
            cached=True,
            metrics=metrics({"digit": 0, "parity": 0}),
            cost=cost(228_000, 3_900_000, 2_100_000, 917_000, 0.62),
        ),
        judged(
            "prune-heads", "pass", 0.33, -0.11, record=record(), cost=cost(173_000, 2_900_000, 1_050_000, 698_000, 0.51)
        ),
        judged(
            "onnx",
            "onnx",
            0.33,
            -0.11,
            cost=cost(173_000, 2_900_000, 1_050_000, 705_000, 0.49),
            artifacts=[{"path": "model.onnx", "bytes": 705_000, "sha256": "ab" * 32}],
        ),
        judged("fp16", "precision", 0.44, -0.11, cost={"parameters": 173_000, "file_bytes": 361_000, "latency": None}),
        stage(
            "engine-sm86",
            "engine",
            status="not-run",
            reason=not_run,
            verdicts=unheard,
            engine=engine("sm86", 86),
            cost={"file_bytes": 731_000},
        ),
    ]


@pytest.fixture
def report() -> Report:
    return copy.deepcopy(
        {
            "schema": "headwise.report/1",
            "headwise": "0.1.0",
            "outcome": "pass",
            "exit_code": 0,
            "reason": "every gate passed; 1 engine was not run",
            "seconds": 93.4,
            "checkpoint": {
                "source": "demo/checkpoint",
                "digest": "0123456789abcdef" * 4,
                "kind": "module",
                "model_type": "TwoHeadViT",
            },
            "recipe": {"gate": {"max_drop": 2.0}, "targets": ["sm86"]},
            "environment": {
                "python": "3.11.7",
                "packages": {"torch": "2.13.0", "onnx": "1.23.2"},
                "device": "Xeon, 2 cores",
            },
            "data": {
                "task": {"source": "test.npz", "digest": "aa" * 32, "samples": 899},
                "calibration": {"source": "calibration.npz", "digest": "bb" * 32, "samples": 512},
            },
            "stages": stages(),
        }
    )


@pytest.fixture
def failed(report: Report) -> Report:
    bad = report["stages"][1]
    bad["status"] = "failed"
    bad["verdicts"][0] = verdict(
        "prune-heads", "digit", "FAIL", 4.1, 2.9, 5.3, "the drop is at least 2.9, the limit 2.0"
    )
    bad["verdicts"][1] = verdict(
        "prune-heads", "parity", "INCONCLUSIVE", 1.9, 1.1, 2.7, "899 samples cannot separate them"
    )
    bad["metrics"] = metrics({"digit": 4.1, "parity": 1.9})
    report["stages"] = [*report["stages"][:2], stage("onnx", "onnx", status="skipped", reason="prune-heads failed")]
    return {**report, "outcome": "fail", "exit_code": 1, "reason": "prune-heads lost too much accuracy"}


def printed(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal(report))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_fits_and_names_everything(report: Report, width: int) -> None:
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    for word in (
        "PASS (exit 0)",
        "baseline",
        "prune-heads",
        "engine-sm86",
        "parity",
        "98.55",
        "0.33",
        "NOT RUN",
        "Drop [interval]",
        "median of 20 interleaved",
    ):
        assert word in text
    assert "no GPU on this machine" in text
    assert "…" not in text


def test_terminal_shows_drop_interval_and_limit_of_a_failure(failed: Report) -> None:
    text = printed(failed, 140)
    assert re.search(r"digit +accuracy +94\.45 +4\.10 \[2\.90, 5\.30\] +2\.00 +FAIL", text)
    assert "INCONCLUSIVE" in text
    assert "onnx: prune-heads failed" in text
    assert "prune-heads: parity f1: 899 samples cannot separate them" in text


def test_a_gain_is_a_negative_drop(report: Report) -> None:
    row = next(r for r in summary.accuracy_rows(report) if r.stage == "prune-heads" and r.output == "parity")
    assert (row.value, row.drop) == ("99.10", "−0.11 [−0.71, 0.49]")


def test_costs_are_relative_to_the_first_stage_that_knows_them(report: Report) -> None:
    baseline, pruned, _, half, engine_stage = report["stages"]
    assert summary.cost_text(report, baseline, "macs") == "3.9\xa0M"
    assert summary.cost_text(report, pruned, "macs") == "2.9\xa0M 74\xa0%"
    assert summary.cost_text(report, half, "macs") == summary.ABSENT
    assert summary.cost_text(report, engine_stage, "file_bytes") == "731\xa0kB 80\xa0%"
    assert "kv_bytes_per_token" not in summary.cost_columns(report)


def test_latency_is_relative_to_the_reference_of_its_own_run(report: Report) -> None:
    report["stages"][2]["cost"]["latency"]["reference_ms"] = 0.98
    assert summary.cost_text(report, report["stages"][2], "latency") == "0.49\xa0ms 50\xa0%"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("file_bytes", 45_900_000, "45.9\xa0MB"),
        ("macs", 12, "12"),
        ("kv_bytes_per_token", 640, "640\xa0B"),
        ("latency", 19.74, "19.7\xa0ms"),
        ("parameters", 22_713_216, "22.7\xa0M"),
        ("macs", 2.72e12, "2.72\xa0T"),
    ],
)
def test_amounts(name: str, value: float, text: str) -> None:
    assert summary.amount(name, value) == text


def test_numbers_and_times() -> None:
    assert summary.number(-0.001, "points") == "0.00"
    assert summary.number(-0.0123, "nats") == "−0.0123"
    assert summary.number(float("nan"), "points") == summary.number(None) == summary.ABSENT
    assert summary.with_unit(1.25, "nats") == "1.2500\xa0nats"
    assert [summary.seconds(s) for s in (0.42, 12.4, 125.9, None)] == ["0.4\xa0s", "12\xa0s", "2\xa0min 5\xa0s", "–"]


def test_head_map_counts_what_the_layouts_say(report: Report) -> None:
    (heads,) = head_maps(report)
    assert heads.removed == ((1, 4), (0, 2, 3, 5), (0, 3))
    assert heads.columns == 6
    assert heads.score == "contribution"
    assert heads.refit[2]["after"] == 0.034


def test_a_report_of_version_0_1_0_is_still_read(report: Report) -> None:
    now = head_maps(report)
    made = report["stages"][1]["record"]
    made |= {when: made[when]["attention"] for when in ("before", "after")}
    assert head_maps(report) == now


def test_second_pass_keeps_the_columns_of_the_original_heads(report: Report) -> None:
    first = report["stages"][1]["record"]
    second = {**copy.deepcopy(first), "before": first["after"], "after": first["after"]}
    second["plan"] = {"edits": [], "scores": None}
    report["stages"].insert(2, stage("prune-heads-2", "pass", record=second))
    again = head_maps(report)[1]
    assert (again.columns, again.removed) == (6, ((), (), ()))
    svg = plots.head_plot(again).svg
    assert "4/4" in svg
    assert "2/2" in svg


def edited(report: Report, edit: Edit) -> None:
    """Let the report's pass have made this one edit."""
    record = report["stages"][1]["record"]
    before = Layout.from_json(record["before"])
    plan = EditPlan(edits=(edit,))
    record |= {"plan": plan.to_json(), "after": plan.predict(before).to_json()}


@pytest.mark.parametrize(
    ("edit", "change", "legend", "uses"),
    [
        (
            ShareKV(layer=1, groups=((0, 2), (1, 3), (4, 5))),
            "6 kv heads become 3: 0+2, 1+3, 4+5",
            "number: the kv head that a query head reads",
            {0: 0, 2: 0, 1: 1, 3: 1, 4: 4, 5: 4},
        ),
        (
            ClusterHeads(layer=1, clusters=((2, 0, 5), (1, 3), (4,))),
            "attention of 2 for 0+5, 1 for 3",
            "number: the head whose attention weights are used",
            {0: 2, 5: 2, 3: 1},
        ),
    ],
)
def test_heads_that_use_another_head_say_which(
    report: Report, edit: Edit, change: str, legend: str, uses: dict[int, int]
) -> None:
    edited(report, edit)
    (heads,) = head_maps(report)
    assert heads.changes == ("unchanged", change, "unchanged")
    assert heads.uses == ({}, uses, {})
    assert heads.removed == ((), (), ())
    page = html(report)
    assert legend in page
    assert change in page
    assert change in markdown(report)


def test_the_form_of_clustered_layers_is_explained(report: Report) -> None:
    forms = choose_form(
        {"gathered": 10**9, "fused": 2 * 10**9}, {"gathered": 3.0, "fused": 2.0}, wanted="auto", engines=False
    )
    report["stages"][2]["record"] = {"parity": [], "nodes": {}, "forms": forms.to_json()}
    (note,) = [note for note in summary.notes(report) if "clustered" in note]
    assert "in the fused form, because it is the faster one" in note
    assert "gathered 1\xa0G MACs, 3\xa0ms" in note


def test_head_plot_crosses_out_every_removed_head(report: Report) -> None:
    (heads,) = head_maps(report)
    plot = plots.head_plot(heads)
    crossed = re.findall(r"fill: none; stroke: var\(--bad\); stroke-width: 1\.8", plot.svg)
    assert len(crossed) == 2 * 8, "two arms for each of eight heads"
    assert "Layer 1: removed 0, 2, 3, 5." in plot.alt


def opacities(svg: str) -> list[float]:
    """Of the accent-coloured cells, in drawing order; SVG leaves out an opacity of 1."""
    cells = re.findall(r"style=\"fill: var\(--accent\)(?:; opacity: ([\d.]+))?\"", svg)
    return [float(value or 1) for value in cells]


def test_head_plot_is_darker_where_the_score_is_higher(report: Report) -> None:
    (heads,) = head_maps(report)
    flat = [heads.scores[layer][head] for layer in range(3) for head in range(6)]
    shades = opacities(plots.head_plot(heads).svg)
    assert len(shades) == 18
    assert [i for _, i in sorted(zip(flat, range(18), strict=True))] == sorted(range(18), key=lambda i: shades[i])


def test_accuracy_plots_have_one_figure_per_output(failed: Report) -> None:
    digit, parity = plots.accuracy_plots(failed)
    assert (digit.title, parity.title) == ("digit: accuracy", "parity: f1")
    assert "prune-heads 94.45 FAIL" in digit.alt
    assert "var(--bad)" in digit.svg
    assert "var(--unsure)" in parity.svg


def test_accuracy_plot_of_a_metric_where_lower_is_better(report: Report) -> None:
    facts = {
        "output": "logits",
        "metric": "nats",
        "unit": "nats",
        "reference": 1.3,
        "value": 1.34,
        "higher_is_better": False,
        "judged": True,
    }
    loss = {
        **verdict("prune-heads", "digit", "PASS", 0.04, 0.02, 0.06),
        "output": "logits",
        "metric": "nats",
        "limit": 0.1,
    }
    report["stages"] = [stage("prune-heads", "pass", metrics=[facts], verdicts=[loss])]
    (point,) = (plots._point(s, "logits", "nats", facts) for s in report["stages"])
    assert point is not None
    assert (point.low, point.high, point.limit) == pytest.approx((1.32, 1.36, 1.4))
    assert len(plots.accuracy_plots(report)) == 1


def test_figures_have_no_fixed_colour_and_are_reproducible(report: Report) -> None:
    made = [*plots.accuracy_plots(report), *plots.cost_plots(report), plots.head_plot(head_maps(report)[0])]
    assert len(made) == 2 + 5 + 1
    for plot in made:
        assert not re.findall(r"#(?!ffffff)[0-9a-f]{6}\b", re.sub(r'"#[^"]*"|url\(#[^)]*\)', "", plot.svg)), plot.title
        texts = re.findall(r"<text [^>]*>", plot.svg)
        assert texts
        assert all("fill: var(--" in text for text in texts), "a text without a colour of its own is black on dark"
    assert plots.accuracy_plots(report)[0].svg == made[0].svg


def test_html_is_self_contained_and_complete(report: Report) -> None:
    page = html(report)
    links = set(re.findall(r"(?:https?:)?//[\w.]+", page)) - {"http://www.w3.org", "//www.w3.org"}
    assert links == set()
    assert "<script" not in page
    assert page.count("<svg") == 8
    for words in (
        "contribution: low",
        "Fused attention",
        "tensorrt-rtx 1.7.1",
        "model.onnx",
        "max_drop: 2.0",
        "0.034",
        "no GPU",
    ):
        assert words in page
    assert "prefers-color-scheme: dark" in page
    ElementTree.fromstring(re.search(r"<svg.*?</svg>", page, re.DOTALL).group())  # type: ignore[union-attr]


def test_html_shows_what_a_reconstruction_did_on_samples_that_it_did_not_see(report: Report) -> None:
    assert "Held out" not in html(report)
    report["stages"][1]["record"]["refit"][1]["reconstruction"] = {"before": 0.0777, "after": 0.0111, "epoch": 3}
    page = html(report)
    assert "Held out, before reconstruction" in page
    assert "0.0777" in page
    assert "0.0111" in page


def test_html_escapes_what_users_wrote(report: Report) -> None:
    report["checkpoint"]["source"] = "<script>alert(1)</script>"
    report["stages"][1]["name"] = "a<b>&c"
    page = html(report)
    assert "<script>" not in page
    assert "a<b>" not in page
    assert "a&lt;b&gt;&amp;c" in page


def test_markdown_has_the_tables_and_the_reasons(failed: Report) -> None:
    text = markdown(failed)
    assert text.startswith("# headwise: fail\n")
    assert "| prune-heads | failed | digit | accuracy | 94.45 | 4.10 \\[2.90, 5.30] | 2.00 | FAIL |" in text
    assert "| 1 | 6 | 2 | removed 0, 2, 3, 5 |" in text
    assert "- **prune-heads**: digit accuracy: the drop is at least 2.9, the limit 2.0" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {re.sub(r"\\.", "", line).count("|") for line in tables} == {9, 8, 5}


def test_markdown_cannot_be_broken_by_a_name(report: Report) -> None:
    report["stages"][1]["name"] = "a|b\nc"
    assert "| a\\|b c |" in markdown(report)


def outcomes(report: Report) -> dict[str, str]:
    cases = ElementTree.fromstring(junit(report)).iter("testcase")
    return {f"{c.get('classname')} {c.get('name')}": "".join(child.tag for child in c) or "passed" for c in cases}


def test_junit_has_a_case_per_verdict(failed: Report) -> None:
    assert outcomes(failed) == {
        "headwise.baseline stage": "passed",
        "headwise.prune-heads accuracy: digit accuracy": "failure",
        "headwise.prune-heads accuracy: parity f1": "failure",
        "headwise.onnx stage": "skipped",
    }
    suites = ElementTree.fromstring(junit(failed))
    assert [suite.get("failures") for suite in suites] == ["0", "2", "0"]
    failure = suites.find(".//failure")
    assert failure is not None
    assert failure.attrib == {"type": "FAIL", "message": "the drop is at least 2.9, the limit 2.0"}


@pytest.mark.parametrize("status", ["warned", "rolled-back"])
def test_junit_is_green_where_the_recipe_goes_on(failed: Report, status: str) -> None:
    failed["stages"][1]["status"] = status
    assert outcomes(failed)["headwise.prune-heads accuracy: digit accuracy"] == "system-out"


@pytest.mark.parametrize(("status", "tag"), [("error", "error"), ("interrupted", "error"), ("not-run", "skipped")])
def test_junit_of_a_stage_without_verdicts(report: Report, status: str, tag: str) -> None:
    report["stages"] = [stage("onnx", "onnx", status=status, reason="because")]
    assert outcomes(report) == {"headwise.onnx stage": tag}


def test_junit_marks_what_could_not_run(report: Report) -> None:
    assert outcomes(report)["headwise.engine-sm86 accuracy: digit accuracy"] == "skipped"


def test_round_trip_through_the_folder(report: Report, tmp_path: Path) -> None:
    report["stages"][1]["metrics"][0]["value"] = float("nan")
    write_report(report, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md", "report.xml"]
    stored = read_report(tmp_path)
    assert stored["stages"][1]["metrics"][0]["value"] is None
    assert stored["stages"][2] == json.loads(json.dumps(report["stages"][2]))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(stored)


def test_an_empty_run_still_has_a_report(report: Report, tmp_path: Path) -> None:
    report.update(stages=[], outcome="interrupted", exit_code=130, reason="interrupted before the first stage", data={})
    write_report(report, tmp_path)
    assert "INTERRUPTED (exit 130)" in printed(report, 80)
    assert "interrupted before the first stage" in (tmp_path / "report.html").read_text(encoding="utf-8")


def spoil(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "report.json").write_text(text) and None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("prepare", "found"),
    [
        (lambda folder: None, "no report.json in"),
        (spoil("{"), "is not JSON"),
        (spoil("[]"), 'has the schema "None"'),
        (spoil('{"schema": "headwise.report/9"}'), 'has the schema "headwise.report/9"'),
    ],
)
def test_unreadable_reports_are_explained(tmp_path: Path, prepare: Callable[[Path], None], found: str) -> None:
    prepare(tmp_path)
    with pytest.raises(DataError) as error:
        read_report(tmp_path)
    assert found in error.value.found
    assert error.value.exit_code == 2


def test_a_report_that_cannot_be_written_is_a_storage_error(report: Report, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        write_report(report, tmp_path / "out")


def test_all_costs_at_once_fit_into_80_columns(report: Report) -> None:
    for entry in report["stages"]:
        entry["cost"]["kv_bytes_per_token"] = 196_608
    report["stages"][-1]["name"] = "engine-jetson-orin"
    text = printed(report, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "cached" in text
    assert re.search(r"Stage +Parameters +MACs +MACs +token +Size +Latency +Took", text)
