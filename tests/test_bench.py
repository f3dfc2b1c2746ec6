"""`headwise bench`: inputs of the sizes that were asked for, children that are asked in turn, and their errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import WIDTH
from rich.console import Console
from runs import copied, finished
from test_cost import graph

from headwise.cli import main
from headwise.device.arrays import Port
from headwise.device.bundle import ARCHIVE
from headwise.errors import DataError, HeadwiseError, MachineError
from headwise.export.decoder import DECODE
from headwise.export.random_inputs import Case, random_inputs, vocabulary_of
from headwise.export.runners import OrtRunner
from headwise.export.torch_variant import TorchVariant
from headwise.export.variants import SINGLE, EngineVariant, GraphVariant, open_variant
from headwise.pipeline.bench import rounds
from headwise.pipeline.bench.child import Served, memory
from headwise.pipeline.bench.parent import Child
from headwise.pipeline.bench.rounds import BenchOptions, bench
from headwise.pipeline.bench.table import bench_table
from headwise.pipeline.folders import bench_graph, dense_graph, usual_tokens
from headwise.pipeline.report.document import read_report

PAST = "past_key_values.0.key"
IDS = {"input_ids": Port("int64", ("batch", "sequence"))}


def test_what_is_timed_may_use_integer_kernels_and_what_is_judged_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph(tmp_path, "(float[2, 2] x) => (float[2, 2] y)", "y = MatMul(x, x)")
    asked: list[str] = []
    make = ort.InferenceSession

    def session(source: str, options: ort.SessionOptions, **given: Any) -> ort.InferenceSession:
        asked.append(options.get_session_config_entry("session.disable_quant_qdq"))
        return make(source, options, **given)

    monkeypatch.setattr(ort, "InferenceSession", session)
    GraphVariant(path, threads=1, provider="cpu")
    OrtRunner(path)
    assert asked == ["0", "1"]


def test_inputs_have_the_sizes_and_the_meaning_that_they_should() -> None:
    inputs = {
        **IDS,
        "attention_mask": Port("int64", ("batch", "total_sequence")),
        "position_ids": Port("int64", ("any", "any")),
        "token_type_ids": Port("int64", ("batch", "sequence")),
        "key_padding_mask": Port("bool", ("batch", "sequence")),
        "past_key_values.0.key": Port("float32", ("batch", 2, "past_sequence", 4)),
        "pixel_values": Port("float16", ("batch", 3, 8, 8)),
    }
    found = random_inputs(inputs, Case(batch=2, tokens=1, past=5, vocabulary=7))
    assert {name: array.shape for name, array in found.items()} == {
        "input_ids": (2, 1),
        "attention_mask": (2, 6),
        "position_ids": (2, 1),
        "token_type_ids": (2, 1),
        "key_padding_mask": (2, 1),
        "past_key_values.0.key": (2, 2, 5, 4),
        "pixel_values": (2, 3, 8, 8),
    }
    assert all(found[name].dtype == dtype for name, (dtype, _) in inputs.items())
    assert found["attention_mask"].all()
    assert (found["position_ids"] == 5).all()
    assert not found["token_type_ids"].any()
    assert not found["key_padding_mask"].any()
    assert found["pixel_values"].std() > 0.5


def test_inputs_are_the_same_for_every_variant_and_cover_the_vocabulary() -> None:
    case = Case(batch=4, tokens=200, vocabulary=7)
    ids = random_inputs(IDS, case)["input_ids"]
    assert set(np.unique(ids)) == set(range(7))
    with_more = random_inputs({"attention_mask": Port("int64", ("any", "any")), **IDS}, case)
    np.testing.assert_array_equal(with_more["input_ids"], ids)


def test_inputs_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(DataError, match="input x has a fixed batch of 1, and 2 was asked for"):
        random_inputs({"x": Port("float32", (1, 4))}, Case(batch=2, tokens=3))
    with pytest.raises(DataError, match="the vocabulary of input input_ids is not known"):
        random_inputs(IDS, Case(batch=2, tokens=3))


def test_the_vocabulary_is_that_of_the_table(tmp_path: Path) -> None:
    def vocabulary(signature: str, body: str) -> int | None:
        return vocabulary_of(graph(tmp_path, f"(int64[B, S] input_ids) => (float[B, S, 2] y) <{signature}>", body, 21))

    table = "float[3, 2] w = {1, 2, 3, 4, 5, 6}"
    assert vocabulary(table, "i = Cast<to=6>(input_ids) y = Gather(w, i)") == 3
    codes = "int8[5, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 9}, float s = {1}"
    assert vocabulary(codes, "t = DequantizeLinear(w, s) y = Gather(t, input_ids)") == 5
    assert vocabulary(table, "p = Shape(input_ids) y = Gather(w, p)") is None


def test_decoders_are_timed_with_the_prompt_and_with_one_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, found = finished("story", tmp_path_factory.getbasetemp())
    models = (str(folder / "checkpoint"), str(found.folder))
    result = CliRunner().invoke(
        main, ["bench", *models, "--rounds", "5", "--starts", "2", "--seq", "6", "--past", "9", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(case["name"], case["tokens"], case["past"]) for case in report["cases"]] == [
        ("prefill", 6, 0),
        ("step", 1, 9),
    ]
    for case in report["cases"]:
        one, other = case["results"]
        assert one["inputs"]["input_ids"] == other["inputs"]["input_ids"] == [1, case["tokens"]]
        # The cache of the compressed model has fewer heads.
        heads = [result["inputs"]["past_key_values.0.key"] for result in (one, other)]
        assert [shape[2] for shape in heads] == [case["past"]] * 2
        assert heads[0][1] == heads[1][1] + 1
        assert one["speedup"] is None
        assert other["speedup"]["rounds"] == len(other["times_ms"]) == 5
        assert other["speedup"]["words"] in other["verdict"]
    torch_side, onnx_side = report["variants"]
    assert (torch_side["runtime"], onnx_side["runtime"]) == ("torch", "onnxruntime")
    assert all(variant["peak_bytes"] > variant["model_bytes"] > 0 for variant in report["variants"])
    console = Console(file=io.StringIO(), width=100)
    console.print(bench_table(report))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step, batch 1, 1 token, 9 in the cache" in shown
    assert "1 thread each; 5 rounds over 2 starts, 5 calls to warm up at each" in " ".join(shown.split())
    for load, busy in ((0.1, False), (0.9, True), (None, False)):
        console = Console(file=io.StringIO(), width=100)
        console.print(bench_table({**report, "load": load}))
        assert ("This machine was busy" in console.file.getvalue()) == busy  # type: ignore[attr-defined]


class Fake:
    """A child in this process."""

    def __init__(self, label: str, artifact: str, threads: int, provider: str) -> None:
        self.label = label
        self._served = Served(artifact, threads, provider)
        self.about = self.ask("load")

    def __enter__(self) -> Fake:
        CALLS.append(f"start {self.label}")
        return self

    def __exit__(self, *exception: object) -> None:
        CALLS.append(f"end {self.label}")

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        if do in ("call", "time"):
            CALLS.append(f"{do} {self.label}")
        found: dict[str, Any] = json.loads(json.dumps(self._served.answer(json.loads(json.dumps({"do": do, **more})))))
        return found


CALLS: list[str] = []


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "Child", Fake)
    CALLS.clear()


@pytest.mark.usefixtures("in_process")
def test_a_single_run_is_compared_with_its_untouched_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, run = finished("text", tmp_path_factory.getbasetemp())
    found = bench([str(run.folder)], BenchOptions(rounds=8, warmup=2, starts=2))
    case = found["cases"][0]
    assert (case["name"], case["tokens"]) == ("forward", 8), "as long as the run counts costs for"
    assert [variant["artifact"] for variant in found["variants"]] == [f"{run.folder} (untouched)", str(run.folder)]
    assert found["variants"][1]["bytes"] < found["variants"][0]["bytes"]
    one, other = f"{run.folder} (untouched)", str(run.folder)
    half = len(CALLS) // 2
    for order, calls in (((one, other), CALLS[:half]), ((other, one), CALLS[half:])):
        assert calls[:2] == [f"start {label}" for label in order], "the second time in the reverse order"
        assert calls[2:6] == [f"call {one}"] * 2 + [f"call {other}"] * 2
        assert calls[-2:] == [f"end {label}" for label in reversed(order)]
        measured = calls[6:-2]
        assert len(measured) == 8
        for turn in range(0, 8, 4):
            assert sorted(set(measured[turn : turn + 2])) == sorted({f"time {one}", f"time {other}"})
            assert measured[turn : turn + 2] == measured[turn + 2 : turn + 4][::-1], "as often first as second"
    assert [len(result["times_ms"]) for result in case["results"]] == [8, 8]


@pytest.mark.usefixtures("in_process")
def test_a_plain_module_takes_the_inputs_of_a_graph(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, run = finished("plain", tmp_path_factory.getbasetemp())
    found = bench([str(folder / "checkpoint"), str(run.folder)], BenchOptions(rounds=2, starts=1, batch=3))
    one, other = found["cases"][0]["results"]
    assert one["inputs"] == other["inputs"] == {"tokens": [3, 5, WIDTH]}
    with pytest.raises(DataError, match="TwoHeads does not say what its inputs look like"):
        bench([str(folder / "checkpoint")] * 2, BenchOptions(rounds=2, starts=1))


@pytest.mark.usefixtures("in_process")
def test_what_cannot_be_compared_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, run = finished("text", tmp_path_factory.getbasetemp())
    with pytest.raises(DataError, match=r"only .*checkpoint to time"):
        bench([str(folder / "checkpoint")], BenchOptions())
    with pytest.raises(DataError, match="5 rounds for 6 starts"):
        bench([str(run.folder)], BenchOptions(rounds=5, starts=6))
    with pytest.raises(DataError, match=r"none\.onnx does not exist"):
        bench([str(run.folder), str(tmp_path / "none.onnx")], BenchOptions())
    with pytest.raises(DataError, match=r"--past 3, but .* runs without a cache here"):
        bench([str(run.folder)], BenchOptions(past=3))
    with pytest.raises(DataError, match=r"--seq 25, but .*checkpoint takes 24 tokens at most"):
        bench([str(folder / "checkpoint"), str(run.folder)], BenchOptions(tokens=25))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / ARCHIVE).touch()
    with pytest.raises(DataError, match=r"bundle is a bundle\n.*--ssh.*\n.*headwise verify .*graphs/onnx/model\.onnx"):
        bench([str(tmp_path / "bundle"), str(run.folder)], BenchOptions())


@pytest.mark.usefixtures("in_process")
def test_few_rounds_have_no_more_starts(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, run = finished("text", tmp_path_factory.getbasetemp())
    assert bench([str(run.folder)], BenchOptions(rounds=2, warmup=0))["starts"] == 2


def test_errors_of_a_child_are_those_of_the_parent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "model.engine"
    engine.touch()
    with pytest.raises(MachineError, match=r"mine: no GPU"):
        Child("mine", str(engine), 1, "cpu")
    path = graph(tmp_path, "(float[B, S] x, float[B, 3] z) => (float[B, S] y)", "y = Add(x, z)", 21)
    with Child("sum", str(path), 1, "cpu") as child:
        case = {"batch": 2, "tokens": 4, "past": None, "vocabulary": None}
        assert child.ask("prepare", case=case, others={})["shapes"] == {"x": [2, 4], "z": [2, 3]}
        with pytest.raises(HeadwiseError, match=r"(?s)sum: .*--seq has to be a length that all models take"):
            child.ask("call")
        assert "Traceback" in capfd.readouterr().err
        child._process.kill()
        with pytest.raises(HeadwiseError, match=r"the process of sum ended with -9 at the order to call"):
            child.ask("call")


def test_a_child_whose_parent_was_interrupted_ends_quietly() -> None:
    command = [sys.executable, "-m", "headwise.pipeline.bench.child"]
    spec = json.dumps({"artifact": "", "threads": 1, "provider": "cpu"})
    with subprocess.Popen([*command, spec], stdin=-1, stdout=-1, stderr=-1, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        child.stdin.write('{"do": "memory"}\n')
        child.stdin.close()
        assert child.stderr.read() == ""
        assert child.wait() == 0


@pytest.mark.usefixtures("in_process")
def test_only_what_the_same_runtime_runs_is_called_smaller(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A graph holds more than the weights: the untouched checkpoint has fewer bytes than its own graph."""
    folder, run = finished("text", tmp_path_factory.getbasetemp())
    graph = str(dense_graph(run.folder, read_report(run.folder)))
    found = bench([graph, str(folder / "checkpoint")], BenchOptions(rounds=5, starts=1, warmup=0, tokens=5))
    sizes = [variant["bytes"] for variant in found["variants"]]
    assert sizes[1] < 0.99 * sizes[0]
    assert "smaller" not in found["cases"][0]["results"][1]["verdict"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ssh", "board", "--batch", "2"], "--ssh and --batch"),
        (["--ssh", "board", "--roofline", "--gpu", "l4"], "--ssh and --roofline"),
        (["--roofline", "--gpu", "l4", "--rounds", "9", "--provider", "cpu"], "--roofline and --provider"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", *options, str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.usefixtures("in_process")
def test_the_command_ends_with_4_where_there_is_no_gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, run = finished("text", tmp_path_factory.getbasetemp())
    result = CliRunner().invoke(main, ["bench", str(run.folder), "--provider", "cuda"])
    assert result.exit_code == 4
    assert "has no CUDAExecutionProvider" in result.output


def test_checkpoints_run_on_what_was_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, _ = finished("text", tmp_path_factory.getbasetemp())
    source = str(folder / "checkpoint")
    with pytest.raises(MachineError, match="is a checkpoint, which PyTorch runs, not TensorRT"):
        TorchVariant(source, threads=1, provider="tensorrt")
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="torch finds no GPU"):
            TorchVariant(source, threads=1, provider="cuda")


def test_single_tokens_have_a_graph_of_their_own(tmp_path: Path) -> None:
    assert SINGLE == DECODE
    signature = f"(float[B, S] x, float[B, P] {PAST.replace('.', '_')}) => (float[B, S] y)"
    for name, scale in (("model.onnx", "x"), (SINGLE, "h")):
        body = "y = Identity(x)" if scale == "x" else "h = Neg(x) y = Neg(h)"
        graph(tmp_path, signature, body, 21).rename(tmp_path / name)
    variant = GraphVariant(tmp_path / "model.onnx", threads=1, provider="cpu")
    sessions = []
    for case in (Case(batch=1, tokens=4, past=0), Case(batch=1, tokens=1, past=3), Case(batch=1, tokens=1)):
        variant.prepare(case, {})
        variant.call()
        sessions.append(variant._used is variant._session)
    assert sessions == [True, False, True]


def test_images_have_the_size_of_the_config(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    variant = open_variant(str(tmp_path), threads=1, provider="cpu")
    assert variant.prepare(Case(batch=2, tokens=5), {}) == {"pixel_values": (2, 3, 8, 8)}
    variant.reset()
    variant.call()
    assert not variant.cached


def test_engines_are_called_with_the_same_inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Engine:
        version, device, inputs = (
            "1.0",
            "a GPU",
            {"x": Port("float32", ("any", 4)), "past_key_values.0.key": Port("float32", ("any", "any"))},
        )

        def run(self, batch: Any) -> None:
            calls.append(batch)

    monkeypatch.setattr("headwise.export.variants.require_gpu", lambda: None)
    monkeypatch.setattr("headwise.export.variants.EngineSession", lambda path, runtime: Engine())
    path = tmp_path / "model.engine"
    path.write_bytes(b"12345")
    (tmp_path / "model.engine.json").write_text(json.dumps({"runtime": "tensorrt"}))
    variant = open_variant(str(path), threads=1, provider="cpu")
    assert isinstance(variant, EngineVariant)
    assert (variant.bytes, variant.device, variant.cached) == (5, "a GPU", False)
    assert variant.prepare(Case(batch=2, tokens=1), {}) == {"x": (2, 4), PAST: (2, 0)}
    variant.reset()
    variant.call()
    assert [set(call) for call in calls] == [{"x", PAST}]


def test_a_run_has_a_graph_per_provider(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = copied("text", tmp_path_factory.getbasetemp(), tmp_path) / "out"
    report = read_report(folder)
    stages = {provider: bench_graph(folder, report, provider).parent.name for provider in ("cpu", "cuda", "tensorrt")}
    assert stages == {"cpu": "02-onnx", "cuda": "03-fp16", "tensorrt": "03-fp16"}
    dense = dense_graph(folder, report)
    assert usual_tokens(dense) == 8
    assert GraphVariant(dense, threads=1, provider="cpu").vocabulary == 24
    dense.unlink()
    with pytest.raises(DataError, match="holds no graph of the untouched model"):
        dense_graph(folder, report)
    assert usual_tokens(tmp_path / "model.onnx") is None
    assert SimpleNamespace(now=memory("VmRSS"), never=memory("VmNothing")).never is None
