"""Embedding tables in fewer bits: a scale per row or per block of a row, and only rows that are read are decoded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from runs import TEXT, run, text_files, write_recipe

from headwise.calibration.formats import restore
from headwise.export.dynamic import write_dynamic
from headwise.export.matrices import find_tables, lookups
from headwise.export.precision import ExportSpec
from headwise.export.quantize import SCALE_DTYPES, write_quantized
from headwise.export.runners import OrtRunner
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine, profiles_for
from headwise.gates.judge import Outcome
from headwise.gates.kernels import judge_kernels
from headwise.model.quantization import QuantPlan
from headwise.passes.quantize import Quantize

HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None
ROWS, WIDTH = 200, 32
BATCH = {"ids": np.random.default_rng(1).integers(0, ROWS, size=(3, 5))}


def graph(folder: Path, text: str = "e = Gather<axis=0>(table, ids)\n y = Add(e, e)") -> Path:
    """A table with one row that is a hundred times larger than the others."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (int64[b, s] ids) => (float[b, s, 32] y) {' + text + "}"
    )
    values = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    values[7] *= 100
    model.graph.initializer.append(numpy_helper.from_array(values, "table"))
    path = folder / "table.onnx"
    onnx.save(model, str(path))
    return path


def run_graph(path: Path) -> Any:
    with OrtRunner(path) as runner:
        return runner(BATCH)["y"]


@pytest.mark.parametrize(("number", "limit"), [("int8", 0.01), ("int4", 0.15)])
def test_rows_are_what_the_codes_say(tmp_path: Path, number: Any, limit: float) -> None:
    path, dtype = graph(tmp_path), SCALE_DTYPES["fp32"]
    options, tables = Quantize(embeddings=number), find_tables(path)
    plan = QuantPlan(matrices=(), tables=options.plan_tables(tables))
    assert QuantPlan.from_json(plan.to_json()) == plan
    codes = options.table_codes(plan.tables, tables, dtype)
    written = write_quantized(path, tmp_path / "out.onnx", plan, codes, precision="fp32")
    stored = {t.name: t for t in onnx.load(str(tmp_path / "out.onnx")).graph.initializer}
    assert "table" not in stored
    assert stored["table.weight_codes"].data_type == (TensorProto.INT8 if number == "int8" else TensorProto.INT4)
    assert [promise.scheme for promise in written.promises] == [f"{number}-weights"]
    expected = 2 * restore(codes["table"], plan.tables[0].block, dtype).T[BATCH["ids"]]
    found, reference = run_graph(tmp_path / "out.onnx"), run_graph(path)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert 0 < np.abs(found - reference).max(axis=-1).max() < limit * np.abs(reference).max()
    small = np.abs(reference).max(axis=-1) < 20  # a large row costs the others nothing
    assert (np.abs(found - reference)[small] < limit * 10).all()
    if number == "int8":
        write_dynamic(path, tmp_path / "cpu.onnx", plan, codes)
        np.testing.assert_allclose(run_graph(tmp_path / "cpu.onnx"), expected, rtol=1e-6)
        nodes = onnx.load(str(tmp_path / "cpu.onnx")).graph.node
        assert [node.op_type for node in nodes] == ["Gather", "Gather", "Cast", "Mul", "Add"]


LEFT = {
    "another node reads it too": "e = Gather<axis=0>(table, ids)\n t = Gather<axis=0>(table, ids)\n y = Add(e, t)",
    "columns and not rows are read": "c = Gather<axis=1>(table, ids)\n y = Cast<to=1>(ids)",
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_plain_table_of_rows_stays(tmp_path: Path, case: str) -> None:
    assert lookups(onnx.load(str(graph(tmp_path, LEFT[case]))).graph) == []


def test_a_table_and_a_matrix_of_one_module_have_different_names(tmp_path: Path) -> None:
    path = graph(tmp_path, "e = Gather<axis=0>(table, ids)\n y = MatMul(e, w)")
    model = onnx.load(str(path))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "w"))
    for node in model.graph.node:
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", str(["", "block", "node"])
    assert [name for name, _ in lookups(model.graph)] == ["block.2"]


def test_small_tables_stay_and_odd_widths_have_no_blocks(tmp_path: Path) -> None:
    path = graph(tmp_path)
    model = onnx.load(str(path))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((8, WIDTH), np.float32), "table"))
    assert lookups(model.graph) == []
    (entry,) = Quantize(embeddings="int4", block=64).plan_tables(find_tables(path))
    assert (entry.scheme, entry.reason) == ("float", "32 inputs are no multiple of 64")
    assert Quantize().plan_tables(find_tables(path)) == ()
    assert Quantize(embeddings="int4").schemes() == {"int8", "int4-table"}


def test_a_run_with_embeddings_in_int8_for_two_runtimes(tmp_path: Path) -> None:
    folder = text_files(tmp_path / "text", vocabulary=300)
    options = {"quantize": {"embeddings": "int8", "matrices": {"*": "float"}}}
    write_recipe(folder, {**TEXT, "passes": [options], "targets": ["cpu"]})
    found = run(folder)
    assert found.exit_code == 0, found.reason
    stage = next(stage for stage in found.report["stages"] if stage["name"] == "cpu")
    rows = {row["name"]: row for row in stage["record"]["matrices"] if row["scheme"] != "float"}
    assert list(rows) == ["embeddings.word_embeddings"]
    (row,) = rows.values()
    assert (row["inputs"], row["outputs"]) == (32, 300)
    assert row["bytes_after"] == 300 * 32 + 4 * 300
    assert 0 < row["error"] < 1e-3
    assert helper.np_dtype_to_tensor_dtype(np.dtype(np.int8)) in {
        tensor.data_type for tensor in onnx.load(str(found.folder / "02-cpu" / "model.onnx")).graph.initializer
    }


@pytest.mark.skipif(not HAS_BUILDER, reason="tensorrt_rtx is not installed: no engine can be built")
@pytest.mark.parametrize(("number", "target"), [("int8", "sm75"), ("int4", "sm86")])
def test_engines_keep_the_codes_of_tables(tmp_path: Path, number: Any, target: str) -> None:
    path = graph(tmp_path, "e = Gather<axis=0>(table, ids)\n y = Add(e, e)")
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.save(model, str(path))
    options, tables = Quantize(embeddings=number), find_tables(path)
    plan = QuantPlan(matrices=(), tables=options.plan_tables(tables))
    codes = options.table_codes(plan.tables, tables, SCALE_DTYPES["fp16"])
    written = write_quantized(path, tmp_path / "out.onnx", plan, codes, precision="fp16")
    profiles = profiles_for(tmp_path / "out.onnx", ExportSpec())
    engine = build_engine(tmp_path / "out.onnx", tmp_path / "e", resolve_target(target), profiles=profiles)
    (verdict,) = judge_kernels(engine.listing, written.promises, "engine")
    assert verdict.outcome is Outcome.PASS, (verdict.reason, engine.listing)
