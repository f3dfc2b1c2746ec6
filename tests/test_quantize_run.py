"""Quantization inside whole runs: its stage, its gate, its report, and what is made again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from runs import TEXT, begun, run, text_files, write_recipe

from headwise.errors import RecipeError, TargetError
from headwise.export.listing import ListingSummary
from headwise.export.tensorrt import EngineInfo
from headwise.model.checkpoint import load_checkpoint
from headwise.model.quantization import QuantPlan
from headwise.pipeline import stages
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.run import Run, check

HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None
ENGINES = ["sm86"] if HAS_BUILDER else []


def recipe(folder: Path, *passes: Any, **changes: Any) -> Path:
    return write_recipe(folder, {**TEXT, "passes": list(passes), **changes})


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun("text", tmp_path_factory.getbasetemp(), tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Heads pruned, everything but the last output in int8."""
    folder = begun("text", tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("quantize"))
    last = "encoder.layer.1.output.dense"
    recipe(folder, {"prune-heads": {"ratio": 0.25}}, {"quantize": {"matrices": {last: "float"}}}, targets=ENGINES)
    return folder, run(folder)


def by_name(found: Run) -> dict[str, Any]:
    return {stage["name"]: stage for stage in found.report["stages"]}


def test_every_stage_is_judged(done: tuple[Path, Run]) -> None:
    found = done[1]
    assert found.exit_code == 0, found.reason
    statuses = {name: stage["status"] for name, stage in by_name(found).items()}
    names = ("baseline", "prune-heads", "onnx", "fp16", "quantize")
    engines = {f"engine-{target}": "not-run" for target in ENGINES}
    assert statuses == {**dict.fromkeys(names, "passed"), **engines}
    stage = by_name(found)["quantize"]
    assert stage["verdicts"][0]["samples"] == 60
    assert stage["cost"]["file_bytes"] < by_name(found)["fp16"]["cost"]["file_bytes"]
    assert stage["cost"]["macs"] == by_name(found)["fp16"]["cost"]["macs"]


def test_the_report_names_every_matrix_as_the_checkpoint_does(done: tuple[Path, Run]) -> None:
    folder, found = done
    rows = by_name(found)["quantize"]["record"]["matrices"]
    pruned = load_checkpoint(folder / "out" / "01-prune-heads" / "model").module
    shapes = {name: tuple(p.shape) for name, p in pruned.named_parameters() if p.dim() == 2 and "embed" not in name}
    assert {f"{row['name']}.weight": (row["outputs"], row["inputs"]) for row in rows} == shapes
    schemes = {row["name"]: row["scheme"] for row in rows}
    assert schemes.pop("encoder.layer.1.output.dense") == "float"
    assert set(schemes.values()) == {"int8"}
    for row in rows:
        size = row["inputs"] * row["outputs"]
        assert row["bytes_before"] == 2 * size
        assert row["bytes_after"] == (2 * size if row["scheme"] == "float" else size + 2 * row["outputs"])
        assert (0 < row["error"] < 0.01) == (row["scheme"] == "int8")
    for form in ("report.md", "report.html"):
        text = (found.folder / form).read_text(encoding="utf-8").replace("\\", "")
        assert "12 matrices, 11 in int8, 1 in float" in text
        assert all(row["name"] in text for row in rows)


def test_the_plan_lies_beside_the_graph(done: tuple[Path, Run]) -> None:
    folder = done[1].folder / "04-quantize"
    plan = QuantPlan.from_json(json.loads((folder / "plan.json").read_text()))
    graph = onnx.load(str(folder / "model.onnx")).graph
    decoded = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.name.endswith("weight_dq")]
    assert len(plan.quantized()) == len(decoded) == 11


@pytest.mark.skipif(not HAS_BUILDER, reason="tensorrt_rtx is not installed: no engine can be built")
def test_the_engine_keeps_the_promise(done: tuple[Path, Run]) -> None:
    stage = by_name(done[1])["engine-sm86"]
    (verdict,) = (v for v in stage["verdicts"] if v["gate"] == "kernels")
    assert (verdict["output"], verdict["outcome"], verdict["samples"]) == ("int8", "PASS", 11)
    assert (done[1].folder / "report.xml").read_text().count("kernels: int8 matrices") == 1


def test_other_options_do_not_calibrate_again(folder: Path) -> None:
    recipe(folder, {"quantize": {"calibration": "mse"}})
    first = run(folder)
    manifest = folder / "out" / "01-onnx.ranges-tensorrt" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    again = run(folder)
    assert all(stage["cached"] for stage in again.report["stages"])
    changed = run(folder, "passes.0.calibration=percentile", "passes.0.percentile=90")
    assert [s["name"] for s in changed.report["stages"] if not s["cached"]] == ["quantize"]
    assert "options" in by_name(changed)["quantize"]["why"]
    assert manifest.stat().st_mtime_ns == before
    errors = [[row["error"] for row in by_name(r)["quantize"]["record"]["matrices"]] for r in (first, changed)]
    assert all(clipped > best for best, clipped in zip(*errors, strict=True))


def test_a_rollback_leaves_the_precision_in_place(folder: Path) -> None:
    ruined = {"quantize": {"calibration": "percentile", "percentile": 51}}
    recipe(folder, ruined, targets=ENGINES, gate={"stages": {"quantize": {"max_drop": 0, "on_fail": "rollback"}}})
    found = run(folder)
    assert found.exit_code == 0, found.reason
    named = by_name(found)
    assert named["quantize"]["status"] == "rolled-back"
    if ENGINES:
        assert "Int8" not in named["engine-sm86"]["engine"]["listing"]["gemms"]
        assert not [v for v in named["engine-sm86"]["verdicts"] if v["gate"] == "kernels"]


def test_quantize_comes_last_and_once() -> None:
    for passes in (["quantize", {"prune-heads": {"ratio": 0.5}}], ["quantize", "quantize"]):
        with pytest.raises(RecipeError, match="quantize is not the last of the passes"):
            load_recipe({**TEXT, "passes": passes})
    loaded = load_recipe({**TEXT, "passes": [{"prune-heads": {"ratio": 0.5}}, {"quantize": {"weights_only": True}}]})
    assert [pass_.name for pass_ in loaded.edits] == ["prune-heads"]
    assert loaded.quantize is not None
    assert loaded.quantize.weights_only
    assert load_recipe(loaded.to_json()) == loaded


def test_a_target_that_cannot_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = text_files(tmp_path / "text")
    recipe(folder, {"quantize": {"format": "fp8"}}, targets=["sm89", "sm86"])
    with pytest.raises(TargetError, match=r"target sm86 \(sm86\) cannot run fp8: fp8 begins with Ada"):
        check(folder / "checkpoint", folder / "recipe.yaml")
    recipe(folder, {"quantize": {"matrices": {"*.query": "nvfp4"}}}, targets=["sm89"])
    with pytest.raises(TargetError, match=r"cannot run nvfp4: fp4 begins with Blackwell"):
        check(folder / "checkpoint", folder / "recipe.yaml")


def test_an_engine_that_breaks_the_promise_fails_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(folder, "quantize", targets=["sm86"])

    def build(graph: Path, out: Path, target: Any, *, profiles: Any, workspace_mb: int | None, **_: Any) -> EngineInfo:
        del workspace_mb
        nodes = [node.name for node in onnx.load(str(graph)).graph.node]
        half = dict.fromkeys(nodes, "Half")
        listing = ListingSummary(
            layers=1, fused_attention=0, gemms={"Half": 13}, attention_kernels=(), products=half, constants=half
        )
        out.write_bytes(b"engine")
        facts = {"target": target.name, "sm": target.sm, "runtime": target.runtime, "version": "0"}
        memory = dict.fromkeys(("weights_bytes", "activation_bytes", "scratch_bytes"))
        return EngineInfo(**facts, bytes=6, seconds=0.1, profiles=profiles, listing=listing, **memory)

    monkeypatch.setattr(stages, "build_engine", build)
    monkeypatch.setattr(stages, "gpu", lambda: None)
    found = run(folder)
    assert found.exit_code == 1
    assert (
        "the gate after engine-sm86 said no: int8 matrices: FAIL, 12 of 12 matrices do not run as planned"
        in found.reason
    )
    assert by_name(found)["engine-sm86"]["status"] == "failed"


def test_two_runtimes_get_a_graph_each(folder: Path) -> None:
    recipe(folder, "quantize", targets=["cpu", *ENGINES])
    found = run(folder)
    assert found.exit_code == 0, found.reason
    names = list(by_name(found))
    assert names == ["baseline", "onnx", "fp16", "quantize", "cpu", *(f"engine-{target}" for target in ENGINES)]
    stage = by_name(found)["cpu"]
    assert stage["status"] == "passed"
    assert stage["verdicts"][0]["samples"] == 60
    kinds = [node.op_type for node in onnx.load(str(found.folder / "04-cpu" / "model.onnx")).graph.node]
    assert kinds.count("MatMulInteger") == 12
    assert {row["scheme"] for row in stage["record"]["matrices"]} == {"int8"}
    assert stage["cost"]["macs"] == by_name(found)["onnx"]["cost"]["macs"]
    assert stage["cost"]["latency"]["method"].startswith("median of 20 interleaved calls")
    assert "QuantizeLinear" in [
        node.op_type for node in onnx.load(str(found.folder / "03-quantize" / "model.onnx")).graph.node
    ]


def test_a_format_that_onnxruntime_lacks_is_judged_decoded(folder: Path) -> None:
    recipe(folder, {"quantize": {"format": "mxfp8", "matrices": {"*.output.dense": "nvfp4"}}})
    found = run(folder)
    assert found.exit_code == 0, found.reason
    stage = by_name(found)["quantize"]
    assert stage["status"] == "passed"
    schemes = [row["scheme"] for row in stage["record"]["matrices"]]
    assert (schemes.count("mxfp8-weights"), schemes.count("nvfp4")) == (8, 4)
    assert stage["cost"]["macs"] == by_name(found)["fp16"]["cost"]["macs"]
    files = {Path(file["path"]).name: file["bytes"] for file in stage["artifacts"]}
    assert stage["cost"]["file_bytes"] == files["model.onnx"] < files["decoded.onnx"]


def test_a_cpu_alone_needs_no_graph_for_tensorrt(folder: Path) -> None:
    recipe(folder, targets=["cpu"])
    found = run(folder)
    assert {name: stage["status"] for name, stage in by_name(found).items()} == dict.fromkeys(
        ("baseline", "onnx", "cpu"), "passed"
    )
    graph = (found.folder / "02-cpu" / "model.onnx").read_bytes()
    assert graph == (found.folder / "01-onnx" / "model.onnx").read_bytes()
    assert [name for name, _ in load_recipe({**TEXT, "targets": ["cpu", "sm86"]}).stage_names()][-3:] == [
        "fp16",
        "cpu",
        "engine-sm86",
    ]


def test_a_budget_leaves_the_dearest_matrices_alone(folder: Path) -> None:
    base = {"format": "int4", "block": 16, "smooth": None}
    recipe(folder, {"quantize": {**base, "budget": {"max_drop": 100, "samples": 16}}})
    everything = run(folder)
    assert everything.exit_code == 0, everything.reason
    record = by_name(everything)["quantize"]["record"]
    drops = {row["name"]: row["drop"] for row in record["matrices"]}
    assert record["sweep"] == {"metric": "fidelity", "samples": 16}
    assert len(drops) == 12
    assert max(drops.values()) > 0
    assert {row["scheme"] for row in record["matrices"]} == {"int4-weights"}
    sweep = folder / "out" / "01-onnx.sweep-tensorrt" / "manifest.json"
    before = sweep.stat().st_mtime_ns

    nothing = run(folder, "passes.0.budget.max_drop=0")
    rows = by_name(nothing)["quantize"]["record"]["matrices"]
    assert [row["scheme"] for row in rows].count("float") >= 9
    assert {row["reason"] for row in rows if row["scheme"] == "float"} == {"left alone by the budget"}

    small = sum(row["bytes_after"] for row in record["matrices"])
    saved = {row["name"]: row["bytes_before"] - row["bytes_after"] for row in record["matrices"]}
    dearest = max(drops, key=lambda name: drops[name] / saved[name])
    limit = (small + saved[dearest]) / 1e6
    sized = run(folder, f"passes.0.budget={{size: {limit}, samples: 16}}")
    rows = by_name(sized)["quantize"]["record"]["matrices"]
    assert [row["name"] for row in rows if row["scheme"] == "float"][:1] == [dearest]
    assert sum(row["bytes_after"] for row in rows) <= limit * 1e6
    assert sweep.stat().st_mtime_ns == before  # measured once for all of them
    markdown = (sized.folder / "report.md").read_text()
    assert "| Alone it costs |" in markdown
    refused = run(folder, "passes.0.budget={size: 0.001, samples: 16}")
    assert refused.exit_code == 2
    assert "at most 0.001 MB, the budget" in refused.reason
    rest = run(folder, "passes.0.budget={max_drop: 1, samples: 28}")
    assert rest.exit_code == 2
    assert "quantize.budget sets 28 of 32 calibration samples aside" in rest.reason
