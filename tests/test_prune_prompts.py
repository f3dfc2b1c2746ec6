"""Prompts of decoders: each head's own share in a smaller cache, equal to masks, whatever the batch is padded with."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import LAYERS, make_model
from rich.console import Console
from runs import STORY, story_files, write_recipe
from runs import run as run_recipe
from test_decoder import llama
from test_passes import samples

from headwise.calibration.stats import Stat, collect
from headwise.errors import ExportError, PlanError, UnsupportedModelError
from headwise.export.decoder import DECODE, caches, check_decoder, decoder_to_onnx, export_decode
from headwise.export.generate import generate
from headwise.export.halves import read_halves
from headwise.export.kv import find_cached
from headwise.export.opening import HalvesRunner, open_runner
from headwise.export.ports import IDS, MASK, POSITIONS
from headwise.export.precision import ExportSpec, convert_precision
from headwise.export.profiles import decode_profiles, engine_shapes, profiles_for
from headwise.export.random_inputs import Case, random_inputs
from headwise.export.stepping import OrtDecoder, TorchDecoder
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.gates.model_cost import kv_bytes_per_prompt_token, kv_bytes_per_token
from headwise.model import surgery
from headwise.model.cache import held_of
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.decoder import empty_past, make_cache, positions
from headwise.model.edits import EditPlan, StreamHeads
from headwise.model.forward import run
from headwise.model.layout import Layout
from headwise.model.saving import save_checkpoint
from headwise.model.token_budget import TokenBudget
from headwise.model.token_edits import KeepTokens
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.prune_tokens import PruneTokens
from headwise.pipeline.commands.generation import continue_prompts, open_writer
from headwise.pipeline.commands.memory import memory_cost, memory_table
from headwise.pipeline.report.head_maps import head_maps
from headwise.tolerances import TWIN

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "opt", "gpt-neox"]
TOKENS = 17
BUDGET = TokenBudget(keep=0.4, score="window", queries=3, first=1, last=1, rest="drop", prompt=True)
VARIANTS = {
    "received": replace(BUDGET, score="received", weighted=False),
    "accumulated": replace(BUDGET, score="accumulated"),
    "random": replace(BUDGET, score="random"),
    "shared": replace(BUDGET, shared=True, queries=30),
    "unprotected": replace(BUDGET, first=0, last=0, keep=0.25),
    "protected": replace(BUDGET, first=4, last=16),
}


def plan_of(view: ModelView, budget: TokenBudget = BUDGET, *keeps: float) -> EditPlan:
    """The same budget in all layers, or with a share for each."""
    shares = keeps or (budget.keep,) * len(view.attention)
    return EditPlan(edits=tuple(KeepTokens(layer=i, budget=replace(budget, keep=k)) for i, k in enumerate(shares)))


def pruned(budget: TokenBudget = BUDGET, *keeps: float) -> ModelView:
    view = ModelView.of(llama())
    surgery.apply(view, plan_of(view, budget, *keeps))
    return view


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of two texts, the second one padded on the left."""
    ids = np.random.default_rng(3).integers(3, 50, (2, TOKENS))
    mask = np.ones((2, TOKENS), np.int64)
    mask[1, :4] = 0
    return ids, mask


def whole(view: ModelView, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of a text that is read at once, without a cache; 0 at padding."""
    inputs = {IDS: ids, MASK: mask, POSITIONS: positions(mask, ids.shape[1])}
    with torch.no_grad():
        logits = run(view.module, {name: torch.as_tensor(array) for name, array in inputs.items()})["logits"]
    return np.asarray(logits.numpy() * mask[..., None])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize(
    ("family", "budget"), [*((f, BUDGET) for f in FAMILIES), *(("llama", budget) for budget in VARIANTS.values())]
)
def test_the_smaller_cache_gives_what_masks_give_and_padding_has_no_influence(family: str, budget: TokenBudget) -> None:
    view, (ids, mask) = ModelView.of(make_model(family)), padded()
    untouched, plan = whole(view, ids, mask), plan_of(view, budget)
    with surgery.twin(view, plan):
        hidden = whole(view, ids, mask)
    assert difference(whole(view, ids, mask), untouched) == 0.0
    surgery.apply(view, plan)
    at_once = whole(view, ids, mask)
    assert difference(at_once, hidden) < TWIN
    assert difference(at_once, untouched) > 100 * TWIN
    decoder = TorchDecoder(view)
    assert difference(read_halves(decoder, ids, mask), at_once) < TWIN
    cached = decoder.cached()
    assert cached["present.0.key"].shape[2] == cached["present.0.shift"].shape[1] == budget.kept(9) + 8
    assert decoder.cache.get_seq_length() == TOKENS
    alone = read_halves(TorchDecoder(view), ids[1:, 4:], mask[1:, 4:])
    assert difference(alone[0], at_once[1, 4:]) < TWIN


def test_tokens_of_the_prompt_see_all_earlier_ones_and_a_share_of_one_is_the_untouched_model() -> None:
    view, (ids, mask) = ModelView.of(llama()), padded()
    untouched = whole(view, ids, mask)
    surgery.apply(view, plan_of(view))
    found = whole(view, ids, mask)
    assert difference(found[0, :9], untouched[0, :9]) < TWIN
    assert difference(found[1, :11], untouched[1, :11]) < TWIN
    assert difference(found[:, -1], untouched[:, -1]) > 100 * TWIN
    # 999 of 1000 tokens are all of 9.
    assert difference(whole(pruned(replace(BUDGET, keep=0.999)), ids, mask), untouched) < TWIN
    same = ModelView.of(llama())
    surgery.apply(same, plan_of(same, replace(BUDGET, keep=1.0)))
    assert same.layout == ModelView.of(llama()).layout


def test_a_head_keeps_what_the_last_queries_of_its_group_look_at() -> None:
    view, (ids, mask) = ModelView.of(make_model("llama")), padded()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with view.attention[0].watch_weights(lambda weights, values: seen.append((weights, values))):
        whole(view, ids[:1, :9], mask[:1, :9])
    weights, values = seen[0]
    group = view.layout.attention[0].group
    worth = weights[0, :, -3:].sum(1).unflatten(0, (-1, group)).sum(1) * values[0, ::group].norm(dim=-1)
    worth[:, [0, -1]] = 1e9
    keys = TorchDecoder(view)
    keys(ids[:1, :9], mask[:1, :9], positions(mask[:1, :9], 9))
    surgery.apply(view, plan_of(view))
    decoder = TorchDecoder(view)
    decoder(ids[:1, :9], mask[:1, :9], positions(mask[:1, :9], 9))
    kept, every = decoder.cached()["present.0.key"][0], keys.cached()["present.0.key"][0]
    for head, best in enumerate(worth.topk(4).indices.tolist()):
        rows = {tuple(row) for row in every[head, sorted(best)].round(4).tolist()}
        assert {tuple(row) for row in kept[head].round(4).tolist()} == rows


def test_a_second_prompt_is_weighed_for_itself_behind_what_is_left() -> None:
    view, (ids, mask) = pruned(), padded()
    decoder = TorchDecoder(view)
    decoder.begin(2)
    for start, end in ((0, 9), (9, 10), (10, 17)):
        decoder(ids[:, start:end], mask[:, :end], positions(mask[:, :end], end - start))
    assert decoder.cached()["present.0.key"].shape[2] == 4 + 1 + 3


def test_transformers_generates_with_the_smaller_cache_and_no_other_one() -> None:
    view = pruned()
    module: Any = view.module
    prompts = [[5, 9, 7, 11, 13, 8, 9], [8, 8, 30, 31, 32]]
    ids = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in prompts])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
    expected = [text.tokens for text in generate(TorchDecoder(view), prompts, new_tokens=20)]
    cache = make_cache(view.layout.cache, empty_past(view.layout.cache, 2))
    found = module.generate(ids, past_key_values=cache, do_sample=False, **options)
    assert found[:, 7:].tolist() == expected
    assert cache.layers[0].keys.shape[2] == BUDGET.kept(7) + 19
    beams = make_cache(view.layout.cache, empty_past(view.layout.cache, 4))
    assert module.generate(ids, past_key_values=beams, num_beams=2, do_sample=False, **options).shape[0] == 2
    cache.layers[0].batch_repeat_interleave(2)
    cache.layers[0].batch_select_indices(torch.tensor([0]))
    assert [tensor.shape[0] for tensor in cache.layers[0].held] == [1] * 3
    with pytest.raises(UnsupportedModelError, match=r"cache that does not know .*\n.*make_cache"):
        module.generate(ids, do_sample=False, **options)


def test_a_saved_model_keeps_its_shares(tmp_path: Path) -> None:
    view, (ids, mask) = pruned(BUDGET, 0.5, 0.25, 1.0), padded()
    assert view.layout.attention[2].tokens is None
    save_checkpoint(Checkpoint(module=view.module, source="x", kind="transformers", digest=""), view, tmp_path)
    again = load_checkpoint(tmp_path).view()
    assert again.layout == view.layout == Layout.from_json(view.layout.to_json())
    assert difference(whole(again, ids, mask), whole(view, ids, mask)) == 0.0
    found = memory_cost(str(tmp_path), memory=1 << 20, batch=3)["models"]["model"]
    token = kv_bytes_per_token(view)
    assert found["kv_bytes_per_prompt_token"] == kv_bytes_per_prompt_token(view) < token == found["kv_bytes_per_token"]
    assert found["prompt"] > found["context"]
    console = Console(width=120, file=io.StringIO())
    console.print(memory_table(memory_cost(str(tmp_path), memory=1 << 20)))
    assert "cache per token of a prompt (fp16)" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "of a prompt alone" in console.file.getvalue()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------- the graphs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelView, Path]:
    """Layers with two shares, and one that keeps all; graphs for prompts and for single tokens."""
    view = pruned(BUDGET, 0.5, 0.25, 1.0)
    path = tmp_path_factory.mktemp("prompts") / "model.onnx"
    ids = np.array([[5, 9, 7], [3, 8, 6]])
    info = decoder_to_onnx(view, ids, path)
    width = view.layout.attention[0].head_dim
    assert info.inputs["past_key_values.0.key"][1] == ("batch", 4, "past_kept_500", width)
    assert info.inputs["past_key_values.1.shift"][1] == ("batch", "past_kept_250", 1)
    assert info.outputs["present.1.value"][1] == ("batch", 4, "kept_250", width)
    assert info.outputs["present.2.key"][1] == ("batch", 4, "total_sequence", width)
    assert (info.nodes["Attention"], info.nodes["TopK"]) == (3, 2)
    assert any("half of it a prompt, padded on the right" in found.shape for found in info.parity)

    class Given:
        def example_batch(self) -> dict[str, np.ndarray]:
            return {IDS: ids}

    decode = export_decode(view, Given(), path, ExportSpec())  # type: ignore[arg-type]
    assert decode is not None
    assert decode.nodes["Attention"] == 3
    assert "TopK" not in decode.nodes
    assert all("by two graphs" in found.shape for found in decode.parity)
    return view, path


def test_a_cache_of_kept_tokens_gets_no_codes(exported: tuple[ModelView, Path]) -> None:
    with pytest.raises(ExportError, match=r"keeps a share of every prompt has no codes(.|\n)*leave out quantize\.kv"):
        find_cached(onnx.load(str(exported[1])))


def test_graphs_write_what_torch_writes_in_a_batch_and_alone(exported: tuple[ModelView, Path]) -> None:
    view, path = exported
    prompts = [[5, 9, 7], [3], [8, 8, 30, 31, 32, 33, 4, 9, 11, 12, 13, 14], [11, 12]]
    expected = [text.tokens for text in generate(TorchDecoder(view), prompts, new_tokens=40, batch=4)]
    assert expected == [text.tokens for text in generate(TorchDecoder(view), prompts, new_tokens=40, batch=1)]
    for decode in (None, path.with_name(DECODE)):
        with OrtDecoder(path, decode=decode, threads=1) as graph:
            assert [text.tokens for text in generate(graph, prompts, new_tokens=40, batch=4)] == expected
            sizes = {name: array.shape[2] for name, array in graph.cached().items() if name.endswith("key")}
            assert sizes == {"present.0.key": 6 + 39, "present.1.key": 3 + 39, "present.2.key": 12 + 39}
            assert [text.tokens for text in generate(graph, prompts, new_tokens=40, batch=1)] == expected


def test_a_prompt_is_read_whole_however_long_it_is(
    exported: tuple[ModelView, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    view, _ = exported
    monkeypatch.setattr("headwise.export.generate.PART", 4)
    decoder = TorchDecoder(view)
    generate(decoder, [list(range(3, 23))], new_tokens=1)
    assert decoder.cached()["present.0.key"].shape[2] == 10


def test_gates_judge_texts_behind_their_first_halves(exported: tuple[ModelView, Path]) -> None:
    view, path = exported
    ids, mask = padded()
    runner = open_runner(path)
    assert isinstance(runner, HalvesRunner)
    with runner:
        found = runner({IDS: ids, MASK: mask})
    assert list(found) == ["logits"]
    assert difference(found["logits"], whole(view, ids, mask)) < 1e-4
    limited = HalvesRunner(TorchDecoder(view), "cpu", rows=1)
    assert difference(limited({IDS: ids, MASK: mask})["logits"], whole(view, ids, mask)) < TWIN


def test_a_graph_with_other_shares_is_found_out(exported: tuple[ModelView, Path]) -> None:
    _, path = exported
    with pytest.raises(ExportError, match=r"of the graph is off by|has shape"):
        check_decoder(pruned(replace(BUDGET, queries=1), 0.5, 0.25, 1.0), path, np.arange(3, 43).reshape(2, 20))


def test_sizes_of_inputs_follow_from_the_shares(exported: tuple[ModelView, Path]) -> None:
    _, path = exported
    assert [held_of(axis, 10) for axis in ("past_sequence", "past_window_7", "past_kept_250")] == [10, 7, 3]
    spec = ExportSpec.model_validate({"sequence": {"min": 1, "opt": 8, "max": 16}, "context": 100})
    first = profiles_for(path, spec, {"sequence": 256})
    assert [shape[2] for shape in first["past_key_values.1.key"].values()] == [0, 0, 100]
    single = decode_profiles(path, first)
    assert [shape[1] for shape in single["past_key_values.0.shift"].values()] == [0, 25, 100]
    assert [shape[1] for shape in single[MASK].values()] == [1, 51, 101]
    with OrtDecoder(path) as graph:
        arrays = random_inputs(graph._inputs, Case(batch=2, tokens=1, past=10, vocabulary=9))
    assert (arrays["past_key_values.1.key"].shape[2], arrays[MASK].shape[1]) == (3, 11)
    assert not arrays["past_key_values.1.shift"].any()


def test_half_precision_writes_and_engines_fuse_attention(exported: tuple[ModelView, Path], tmp_path: Path) -> None:
    _, path = exported
    half = tmp_path / "half.onnx"
    convert_precision(path, half, "fp16")
    prompts = [[5, 9, 7, 4, 12, 13], [8, 8, 30]]
    with OrtDecoder(half, threads=1) as graph, OrtDecoder(path, threads=1) as full:
        found, expected = (generate(decoder, prompts, new_tokens=3) for decoder in (graph, full))
    assert found == expected
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: no engine can be built")
    shapes = engine_shapes(half, ExportSpec(context=100), {"sequence": 256})
    info = build_engine(half, tmp_path / "e", resolve_target("sm86"), **shapes)
    assert info.listing is not None
    # One in every layer, for prompts and for single tokens.
    assert info.listing.fused_attention == 2 * 3


def test_without_a_cache_there_is_nothing_to_prune() -> None:
    view = pruned()
    batch = {IDS: np.array([[5, 9, 7]])}
    with pytest.raises(ExportError, match=r"keeps a share of every prompt in a cache, but export\.cache is"):
        caches(view, batch, wanted=False)
    with pytest.raises(ExportError, match="in a cache, but it is fed x beside tokens"):
        caches(view, {**batch, "x": batch[IDS]}, wanted="auto")


# ------------------------------------------------------------------------------------------------------------ the pass


def planned(family: str = "llama", **options: Any) -> EditPlan:
    view = ModelView.of(make_model(family))
    return make_plan(PruneTokens.model_validate(options), view, *samples(view, family))[0]


def budgets(plan: EditPlan) -> list[TokenBudget]:
    return [edit.budget for edit in plan.edits if isinstance(edit, KeepTokens)]


def test_defaults_of_decoders_reach_the_layout() -> None:
    expected = TokenBudget(keep=0.5, score="window", queries=16, first=1, last=16, rest="drop", prompt=True)
    assert budgets(planned(keep=0.5)) == [expected] * LAYERS
    other = planned(keep=0.25, score="accumulated", last=2, first=3, per="layer", queries=2, weighted=False)
    same: dict[str, Any] = {"shared": True, "weighted": False, "rest": "drop", "prompt": True}
    assert budgets(other)[0] == TokenBudget(keep=0.25, score="accumulated", queries=2, first=3, last=2, **same)


def test_a_budget_is_spread_and_thresholds_move_shares_of_prompts() -> None:
    shares = [budget.keep for budget in budgets(planned(budget=0.5))]
    assert sum(shares) + (LAYERS - len(shares)) <= 0.5 * LAYERS
    assert {b.keep for b in budgets(planned(keep=0.5, delta=0.2, alpha=0.0, beta=0.0, last=0))} == {0.7}
    assert {b.keep for b in budgets(planned(keep=0.5, delta=0.2, alpha=1.0, beta=1.0))} == {0.3}


def test_statistics_of_prompts_are_what_masks_say() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = samples(view, "llama")
    one = examples.of([examples.rows[0]], source="made up", padding=examples.padding)
    stats = collect(view, task, one, {Stat.TOKEN_COST, Stat.END_ATTENTION})
    cost, ends = stats[Stat.TOKEN_COST][0], stats[Stat.END_ATTENTION][0]
    assert float(cost[-1]) == 0.0
    assert float(cost[0]) > 0
    # All queries of this short prompt are asked, and they see nothing but the prompt.
    assert torch.allclose(ends[:, -1], torch.ones(2, dtype=torch.float64))
    seen: list[torch.Tensor] = []
    with view.attention[0].watch_weights(lambda weights, _: seen.append(weights)), torch.no_grad():
        view.module(torch.as_tensor(one.rows[0][IDS])[None])
    half = (seen[0].shape[-1] + 1) // 2
    received = seen[0][:, :, :half, :half].mean((0, 1, 2)).double()
    assert torch.allclose(ends[0, :half], received.cumsum(0), atol=1e-6)


def test_a_refit_brings_outputs_behind_the_prompt_back() -> None:
    view, teacher = (ModelView.of(make_model("llama")) for _ in range(2))
    record = run_pass(PruneTokens(keep=0.4, last=1, refit=True), view, teacher, *samples(view, "llama"))
    assert len(record.refit) == LAYERS
    assert all(fit["after"] < fit["before"] for fit in record.refit)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"keep": 0.5, "reduce": "tokens"}, "reduce: tokens in a decoder\n.*goes through all layers"),
        ("llama", {"keep": 0.5, "score": "pooled"}, "score: pooled in a decoder\n.*another score"),
        ("llama", {"keep": 0.5, "rest": "fuse"}, "rest: fuse in a decoder\n.*drop"),
        ("gemma2", {"keep": 0.5}, r"cannot be applied to layer \d \(gemma2\)\n.*see the last tokens only already"),
        ("bart", {"keep": 0.5}, "known for decoders without an encoder"),
        ("albert", {"keep": 0.5, "score": "accumulated"}, "score: accumulated on layers of .*\n.*one stack"),
    ],
)
def test_what_a_model_cannot_do_says_why(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(family, **options)


def test_heads_that_stream_keep_no_share() -> None:
    view = pruned()
    with pytest.raises(PlanError, match="keeps a share of the tokens"):
        EditPlan(edits=(StreamHeads(layer=0, windows={0: 2}, sink=1),)).check(view.layout)
    streaming = ModelView.of(llama())
    surgery.apply(streaming, EditPlan(edits=(StreamHeads(layer=0, windows={0: 2}, sink=1),)))
    with pytest.raises(PlanError, match="heads of layer 0 stream already"):
        plan_of(streaming).check(streaming.layout)


def test_a_run_from_recipe_to_texts(tmp_path: Path) -> None:
    folder = story_files(tmp_path / "story")
    recipe = {name: value for name, value in STORY.items() if name not in ("quantize", "passes")}
    pass_ = {"prune-tokens": {"keep": 0.5, "last": 1, "queries": 4}}
    write_recipe(folder, {**recipe, "passes": [pass_], "targets": ["cpu"], "gate": {"max_drop": 100.0}})
    found = run_recipe(folder)
    stages = {stage["name"]: stage for stage in found.report["stages"]}
    assert {stages[name]["status"] for name in ("prune-tokens", "onnx", "cpu")} == {"passed"}
    assert (folder / "out" / stages["cpu"]["folder"] / DECODE).exists()
    cost = stages["prune-tokens"]["cost"]
    assert cost["kv_bytes_per_prompt_token"] < cost["kv_bytes_per_token"]
    assert head_maps(found.report)[0].changes[0] == "every head keeps its own 50.0% of a prompt's tokens, the rest goes"
    texts = [
        continue_prompts(open_writer(str(folder / "out"), runtime=runtime), ["red fox", "a"], new_tokens=6)["texts"]
        for runtime in ("ort", "torch")
    ]
    assert texts[0] == texts[1]
