"""Latent attention as two graphs: one reads prompts and computes keys and values, one adds tokens and absorbs that.

Quantized, both have the same codes and the same caches.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from quantizers import distance, outputs, quantized
from runs import STORY, run, story_files, write_recipe
from test_decoder import PROMPTS, llama, torch_generates
from test_passes import samples

from headwise.calibration.tasks import Examples
from headwise.cli import main
from headwise.errors import ExportError
from headwise.export.absorbed import find_absorbed
from headwise.export.decoder import DECODE, export_decode, export_model
from headwise.export.generate import generate
from headwise.export.precision import ExportSpec, convert_precision
from headwise.export.profiles import decode_profiles, profiles_for
from headwise.export.quantize import Promise
from headwise.export.single import require_like
from headwise.export.stepping import OrtDecoder
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.gates.cost import graph_cost
from headwise.gates.judge import Outcome
from headwise.gates.kernels import judge_kernels
from headwise.model.view import ModelView
from headwise.passes.base import Pass, run_pass
from headwise.passes.latent_kv import LatentKVPass
from headwise.passes.share_layers import ShareLayersPass
from headwise.pipeline.folders import runnable_graph
from headwise.pipeline.graphs import GRAPH, judged
from headwise.pipeline.report.document import read_report
from headwise.pipeline.report.summary import engine_rows, notes

HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None


class Pair(NamedTuple):
    """A latent decoder, its samples, and the graph that reads prompts; the other one lies beside it."""

    view: ModelView
    examples: Examples
    path: Path


def compressed(pass_: Pass) -> tuple[ModelView, Examples]:
    view = ModelView.of(llama())
    task, examples = samples(view, "llama")
    run_pass(pass_, view, ModelView.of(llama()), task, examples)
    return view, examples


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    view, examples = compressed(LatentKVPass(rank=16, rotary=6, refit=False))
    path = tmp_path_factory.mktemp("latent") / "model.onnx"
    export_model(view, examples, path, ExportSpec())
    info = export_decode(view, examples, path, ExportSpec())
    assert info is not None
    shapes = {parity.shape for parity in info.parity}
    assert sum("by two graphs" in shape for shape in shapes) == 2
    assert len(shapes) == 7
    assert max(parity.max_abs for parity in info.parity) < 1e-4
    return Pair(view, examples, path)


def test_both_graphs_take_and_give_the_same_cache(pair: Pair) -> None:
    both = [onnx.load(str(path)).graph for path in (pair.path, pair.path.with_name(DECODE))]
    for side in ("input", "output"):
        left, right = ({v.name: str(v.type) for v in getattr(graph, side)} for graph in both)
        assert left == right


def test_only_one_of_them_computes_keys_and_values_of_the_past(pair: Pair) -> None:
    """Behind 32 tokens more, that is 32 times the up-projections."""
    macs = {}
    for path in (pair.path, pair.path.with_name(DECODE)):
        shapes = {name: list(dims) for name, (_, dims) in _signature(path).items()}
        for past in (8, 40):
            sizes = {"batch": 1, "sequence": 1, "past_sequence": past, "total_sequence": past + 1}
            fed = {name: [sizes.get(d, d) for d in dims] for name, dims in shapes.items()}
            macs[path.name, past] = graph_cost(path, fed).macs  # type: ignore[arg-type]
    grows = {name: macs[name, 40] - macs[name, 8] for name in (pair.path.name, DECODE)}
    heads, head_dim, rank, rotary, layers = 4, 12, 16, 6, 3
    assert grows[DECODE] == 32 * layers * heads * 2 * (rank + rotary)
    width = head_dim + rotary
    assert grows[pair.path.name] == 32 * layers * heads * (2 * rank * head_dim + 2 * width)


def _signature(path: Path) -> dict[str, tuple[int, list[Any]]]:
    inputs = onnx.load(str(path)).graph.input
    return {v.name: (0, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in inputs}


def test_200_tokens_by_both_graphs_are_those_of_torch(pair: Pair) -> None:
    with OrtDecoder(pair.path, decode=pair.path.with_name(DECODE), threads=1) as graphs:
        found = generate(graphs, PROMPTS, new_tokens=200, batch=4)
    assert [text.tokens for text in found] == torch_generates(pair.view, PROMPTS, 200)


def test_single_tokens_go_to_the_second_graph(pair: Pair, tmp_path: Path) -> None:
    model = onnx.load(str(pair.path.with_name(DECODE)))
    model.graph.node.append(onnx.helper.make_node("Neg", ["true_logits"], ["logits"]))
    for node in list(model.graph.node)[:-1]:
        node.output[:] = ["true_logits" if name == "logits" else name for name in node.output]
    onnx.save(model, str(tmp_path / "negated.onnx"))
    ids, mask, position = np.array([[5, 9]]), np.ones((1, 2), np.int64), np.array([[0, 1]])
    scores = {}
    for name, decode in (("one", None), ("two", tmp_path / "negated.onnx")):
        with OrtDecoder(pair.path, decode=decode, threads=1) as decoder:
            first = decoder(ids, mask, position)
            scores[name] = first, decoder(ids[:, :1], np.ones((1, 3), np.int64), np.array([[2]]))
    assert np.array_equal(scores["one"][0], scores["two"][0])
    np.testing.assert_allclose(scores["one"][1], -scores["two"][1], atol=1e-4)


def test_there_is_one_graph_where_one_is_wanted_or_nothing_is_absorbed(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert export_decode(pair.view, pair.examples, path, ExportSpec(decode="same")) is None
    assert export_decode(pair.view, pair.examples, path, ExportSpec(cache=False)) is None
    view, examples = compressed(ShareLayersPass(rank=10, refit=False))
    assert export_decode(view, examples, path, ExportSpec()) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_exports_both_and_continues_texts_with_both(tmp_path: Path) -> None:
    folder = story_files(tmp_path / "story")
    recipe = {**STORY, "passes": [{"latent-kv": {"rank": 24, "rotary": 8}}], "gate": {"max_drop": 5.0}}
    write_recipe(folder, recipe)
    assert run(folder).outcome == "pass"
    report, out = read_report(folder / "out"), folder / "out"
    graph = runnable_graph(out, report)
    assert graph == out / "03-cpu" / "model.onnx"
    assert graph.with_name(DECODE).read_bytes() == (out / "02-onnx" / DECODE).read_bytes()
    assert any("calls of one token have a graph of their own" in note for note in notes(report))
    texts = {}
    for runtime in ("ort", "torch"):
        arguments = ["generate", out, "--prompt", "t", "--prompt", "e e f", "--max-new-tokens", 12, "--json"]
        result = CliRunner().invoke(main, [*map(str, arguments), "--runtime", runtime])
        assert result.exit_code == 0, result.output
        texts[runtime] = json.loads(result.stdout)["texts"]
    assert texts["ort"] == texts["torch"]
    assert not (out / "00-baseline" / DECODE).exists()
    write_recipe(folder, {**recipe, "passes": [*recipe["passes"], {"quantize": {"kv": "int8"}}]})
    both_are_quantized(folder)


def both_are_quantized(folder: Path) -> None:
    """The same run with one stage more, each graph of which is judged and runs."""
    found = run(folder)
    assert found.outcome == "pass", found.reason
    stage = next(stage for stage in found.report["stages"] if stage["name"] == "cpu")
    judged_outputs = [verdict["output"] for verdict in stage["verdicts"]]
    assert judged_outputs == ["logits", "logits, single tokens"]
    assert [metric["output"] for metric in stage["metrics"] if metric["judged"]] == judged_outputs
    assert any("4 matrices of latents, which it multiplies queries and outputs with" in n for n in notes(found.report))
    graph = runnable_graph(found.folder, found.report)
    for name in BOTH:
        kinds = [node.op_type for node in onnx.load(str(graph.with_name(name))).graph.node]
        assert kinds.count("MatMulInteger") == (19 if name == GRAPH else 15)
    result = CliRunner().invoke(main, ["generate", str(found.folder), "--prompt", "t", "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(not HAS_BUILDER, reason="tensorrt_rtx is not installed: no engine can be built")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_both_engines_have_fused_attention_in_every_layer(pair: Pair, precision: Any, tmp_path: Path) -> None:
    spec = ExportSpec(context=100)
    made = {}
    for name in (pair.path.name, DECODE):
        convert_precision(pair.path.with_name(name), tmp_path / name, precision)
        shapes = profiles_for(tmp_path / name, spec, {"sequence": 256})
        if name == DECODE:
            shapes = decode_profiles(tmp_path / name, shapes)
        made[name] = build_engine(tmp_path / name, tmp_path / f"{name}.engine", resolve_target("sm86"), profiles=shapes)
        listing = made[name].listing
        assert listing is not None
        assert listing.fused_attention == 3
    stage = {"engine": {**made[pair.path.name].to_json(), "decode_engine": made[DECODE].to_json()}}
    assert [row[0] for row in engine_rows({"stages": [stage]})] == ["sm86", "sm86, single tokens"]


BOTH = (GRAPH, DECODE)
NUMBERS: tuple[dict[str, Any], ...] = (
    {"format": "int8", "weights_only": True},
    {"format": "int4", "block": 16, "rounding": "gptq", "kv": "int8"},
    {"matrices": {"*": "float"}, "kv": "fp8"},
)


@pytest.mark.parametrize("options", NUMBERS, ids=str)
def test_quantized_both_compute_with_the_same_numbers(pair: Pair, options: dict[str, Any], tmp_path: Path) -> None:
    info = quantized(pair.path, pair.view, pair.examples, tmp_path, **options)
    prompts, single = ({promise["matrix"] for promise in info[key]} for key in ("promises", "single_promises"))
    assert single == prompts
    assert len(single) == (0 if "matrices" in options else 28)
    paths = [tmp_path / "out" / name for name in BOTH]
    found = [outputs(path, pair.examples) for path in paths]
    assert distance(found[1], found[0]) < 1e-5
    assert 1e-3 < distance(found[0], outputs(pair.path, pair.examples)) < 0.5
    texts = []
    for decode in (None, judged(paths[1])):
        with OrtDecoder(judged(paths[0]), decode=decode, threads=1) as decoder:
            texts.append(generate(decoder, PROMPTS, new_tokens=20))
    assert texts[0] == texts[1]


def test_inputs_of_what_is_absorbed_are_not_quantized(pair: Pair, tmp_path: Path) -> None:
    info = quantized(pair.path, pair.view, pair.examples, tmp_path, kv="int8", precision="fp16")
    alone = {promise["matrix"] for promise in info["single_promises"] if promise["weights_only"]}
    assert alone == set(info["record"]["single"]["absorbed"])
    assert alone == {f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("k_up", "v_up")}
    assert not [promise for promise in info["promises"] if promise["weights_only"]]
    exact = outputs(pair.path, pair.examples)
    errors = [distance(outputs(tmp_path / "out" / name, pair.examples), exact) for name in BOTH]
    assert max(errors) < 0.15
    assert max(errors) < 1.2 * min(errors)


def test_another_matrix_in_the_graph_of_single_tokens_is_found_out(pair: Pair) -> None:
    prompts, single = (onnx.load(str(pair.path.with_name(name))) for name in BOTH)
    require_like(single, prompts)
    name = find_absorbed(single.graph)[0].weight
    constant = next(tensor for tensor in single.graph.initializer if tensor.name == name)
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * np.float32(2), name))
    with pytest.raises(ExportError, match=r"has another matrix model\.layers\.0\.self_attn\.k_up than the one"):
        require_like(single, prompts)


@pytest.mark.skipif(not HAS_BUILDER, reason="tensorrt_rtx is not installed: no engine can be built")
def test_both_engines_keep_the_promise(pair: Pair, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "int4", "block": 16, "kv": "fp8"}
    info = quantized(pair.path, pair.view, pair.examples, tmp_path, precision="bf16", **options)
    for name, key in zip(BOTH, ("promises", "single_promises"), strict=True):
        path = tmp_path / "out" / name
        shapes = profiles_for(path, ExportSpec(context=100), {"sequence": 256})
        shapes = decode_profiles(path, shapes) if name == DECODE else shapes
        listing = build_engine(path, tmp_path / "an.engine", resolve_target("sm120"), profiles=shapes).listing
        assert listing is not None
        assert listing.fused_attention == 3
        verdicts = judge_kernels(listing, [Promise(**promise) for promise in info[key]], name)
        assert {verdict.outcome for verdict in verdicts} == {Outcome.PASS}
        assert sum(verdict.samples for verdict in verdicts) == 28
