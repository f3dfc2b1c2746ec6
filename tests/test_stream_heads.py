"""Heads that stream: exact where windows cover the text, equal to masks elsewhere, with a cache that stays bounded."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import KV_HEADS, LAYERS, largest_difference, make_model
from pydantic import ValidationError
from rich.console import Console
from test_decoder import llama
from test_kv_cache import RoundingDecoder, coded, scaled, texts
from test_passes import samples

from headwise.calibration.stats import HeadStats, Stat
from headwise.calibration.stream_gates import train_gates
from headwise.calibration.streaming import GateTraining, Span
from headwise.errors import ExportError, PlanError
from headwise.export.decode import decode_for_onnxruntime
from headwise.export.decoder import check_decoder, decoder_to_onnx
from headwise.export.generate import generate
from headwise.export.kv import find_cached, quantize_cached
from headwise.export.kv_cache import code_caches
from headwise.export.precision import ExportSpec, convert_precision, to_precision
from headwise.export.profiles import decode_profiles, engine_shapes, profiles_for
from headwise.export.stepping import OrtDecoder, TorchDecoder
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.gates.model_cost import kv_bytes_per_token, kv_bytes_windows
from headwise.model import surgery
from headwise.model.cache import CacheTensor
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.decoder import empty_past, held, make_cache, positions, why_no_cache
from headwise.model.edits import ClusterHeads, DropHeads, EditPlan, StreamHeads
from headwise.model.forward import run
from headwise.model.layout import AttentionLayout, Layout
from headwise.model.limits import limits
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.stream_heads import StreamHeadsPass
from headwise.pipeline.commands.memory import memory_cost, memory_table
from headwise.tolerances import TWIN

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "opt", "gpt-neox"]
TOKENS, SINK = 17, 2


def plan_of(view: ModelView, *windows: int) -> EditPlan:
    """All kv heads but one stream in the first layer, all in the second one, one in the last."""
    kv = view.layout.attention[0].kv
    first = {head: windows[head % len(windows)] for head in kv[1:]}
    chosen = (first, dict.fromkeys(kv, windows[0]), {kv[0]: windows[-1]})
    return EditPlan(edits=tuple(StreamHeads(layer=i, windows=w, sink=SINK) for i, w in enumerate(chosen)))


def padded_inputs() -> dict[str, torch.Tensor]:
    """Two texts, the second one padded on the left by more tokens than there are slots for first ones."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :4] = 0
    ids = torch.randint(3, 50, (2, TOKENS), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.as_tensor(positions(mask.numpy(), TOKENS)),
    }


def logits(view: ModelView, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the tokens that are no padding."""
    with torch.no_grad():
        return run(view.module, inputs)["logits"][inputs["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_model_is_its_masked_twin_and_keeps_heads_by_their_ids(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), padded_inputs()
    plan, untouched = plan_of(view, 3, 2), logits(view, inputs)
    with surgery.twin(view, plan):
        expected = logits(view, inputs)
    assert torch.equal(untouched, logits(view, inputs))
    surgery.apply(view, plan)
    found = logits(view, inputs)
    assert float((found - expected).abs().max()) < TWIN
    assert float((found - untouched).abs().max()) > 100 * TWIN
    last = view.layout.attention[2]
    assert last.kv == (*range(1, len(last.kv)), 0)
    assert last.windows == (*[0] * (len(last.kv) - 1), 2)
    assert last.query == tuple(h for kv in last.kv for h in range(kv * last.group, (kv + 1) * last.group))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("windows", "sink"), [((TOKENS,), 0), ((1,), TOKENS), ((TOKENS - 3,), 3)])
def test_windows_that_cover_the_text_change_nothing(family: str, windows: tuple[int, ...], sink: int) -> None:
    view, inputs = ModelView.of(make_model(family)), padded_inputs()
    untouched = logits(view, inputs)
    plan = EditPlan(edits=tuple(replace(edit, sink=sink) for edit in plan_of(view, *windows).edits))
    surgery.apply(view, plan)
    # In rows that start later, too.
    assert float((logits(view, inputs) - untouched).abs().max()) < TWIN


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("steps", [[TOKENS], [4, 13], [2, *[1] * 15], [6, 5, 6]])
def test_a_cache_that_drops_gives_what_the_whole_text_gives(family: str, steps: list[int]) -> None:
    view, inputs = ModelView.of(make_model(family)), padded_inputs()
    surgery.apply(view, plan_of(view, 3, 2))
    decoder, start, found = TorchDecoder(view), 0, []
    decoder.begin(2)
    ids, mask = (inputs[name].numpy() for name in ("input_ids", "attention_mask"))
    for step in steps:
        end = start + step
        found.append(decoder(ids[:, start:end], mask[:, :end], positions(mask[:, :end], step)))
        start = end
    together = torch.as_tensor(np.concatenate(found, axis=1))[inputs["attention_mask"].bool()]
    assert float((together - logits(view, inputs)).abs().max()) < TWIN
    sizes = {name: tensor.shape[2] for name, tensor in decoder.cached().items()}
    assert sizes["present.0.key"] == sizes["present.2.value"] == TOKENS
    assert sizes["present.1.window3_key"] == SINK + 3
    assert sizes["present.2.window2_value"] == SINK + 2
    assert all(held(view.layout, mask)["present.1.window3_key"].sum(1) == [SINK + 3, SINK + 3])


def test_a_padded_text_gives_what_it_gives_alone() -> None:
    view, inputs = ModelView.of(make_model("llama")), padded_inputs()
    surgery.apply(view, plan_of(view, 3))
    alone = {name: tensor[1:, 4:] for name, tensor in inputs.items()}
    both = logits(view, inputs)[-(TOKENS - 4) :]
    assert float((both - logits(view, alone)).abs().max()) < TWIN


def test_transformers_generates_with_the_bounded_cache_and_searches_with_beams() -> None:
    view = ModelView.of(llama())
    surgery.apply(view, plan_of(view, 4))
    module: Any = view.module
    ids = torch.tensor([[0, 0, 5, 9, 7], [8, 8, 30, 31, 32]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 2):
        rows = len(ids) * beams
        cache = make_cache(view.layout.cache, empty_past(view.layout.cache, rows))
        bounded = module.generate(ids, past_key_values=cache, num_beams=beams, do_sample=False, **options)
        plain = module.generate(ids, use_cache=False, num_beams=beams, do_sample=False, **options)
        assert torch.equal(bounded, plain)
        assert cache.layers[1].windows[0].shape[2] == SINK + 4
        assert cache.layers[1].get_seq_length() == cache.get_seq_length() == ids.shape[1] + 29
    cache.layers[0].batch_repeat_interleave(2)
    cache.layers[0].batch_select_indices(torch.tensor([0]))
    assert [tensor.shape[0] for tensor in cache.layers[0].tensors()] == [1] * 4


def test_a_saved_model_streams_when_it_is_loaded(tmp_path: Path) -> None:
    view, inputs = ModelView.of(make_model("llama")), padded_inputs()
    surgery.apply(view, plan_of(view, 3))
    expected = logits(view, inputs)
    save_checkpoint(Checkpoint(module=view.module, source="x", kind="transformers", digest=""), view, tmp_path)
    again = load_checkpoint(tmp_path).view()
    assert again.layout == view.layout
    assert Layout.from_json(json.loads(json.dumps(view.layout.to_json()))) == view.layout
    assert torch.equal(logits(again, inputs), expected)
    assert not json.loads((tmp_path / "headwise.json").read_text())["stock"]


# ----------------------------------------------------------------------------------------------------------- the graph


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelView, Path]:
    """Layer 0 has two windows beside a head that sees all, layer 1 nothing but a window."""
    view = ModelView.of(llama())
    surgery.apply(view, plan_of(view, 5, 3))
    path = tmp_path_factory.mktemp("streaming") / "model.onnx"
    info = decoder_to_onnx(view, np.array([[5, 9, 7], [3, 8, 6]]), path)
    width = view.layout.attention[0].head_dim
    assert info.inputs["past_key_values.1.window5_key"][1] == ("batch", 4, "past_window_7", width)
    assert info.inputs["past_key_values.0.window3_value"][1] == ("batch", 2, "past_window_5", width)
    assert info.outputs["present.0.window3_key"][1] == ("batch", 2, "window_5", width)
    assert info.outputs["present.0.key"][1] == ("batch", 1, "total_sequence", width)
    assert info.nodes["Attention"] == 3 + 1 + 2
    # Checked on texts that are longer than what any head keeps.
    assert {found.shape.split()[0] for found in info.parity} == {"2x10", "1x10"}
    return view, path


def test_the_graph_writes_what_torch_writes_long_after_tokens_were_dropped(exported: tuple[ModelView, Path]) -> None:
    view, path = exported
    prompts = [[5, 9, 7], [3], [8, 8, 30, 31, 32, 33, 4, 9, 11, 12, 13, 14], [11, 12]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    module: Any = view.module
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 60, "use_cache": False}
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = module.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    with OrtDecoder(path, threads=1) as graph:
        found = generate(graph, prompts, new_tokens=60, batch=4)
        sizes = {name: array.shape[2] for name, array in graph.cached().items()}
        alone = generate(graph, prompts, new_tokens=60, batch=1)
    assert [text.tokens for text in found] == expected == [text.tokens for text in alone]
    assert sizes["present.1.window5_key"] == SINK + 5
    assert sizes["present.0.window3_key"] == SINK + 3
    assert sizes["present.0.key"] == width + 59


@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_a_cache_of_codes_drops_tokens_as_torch_does(
    exported: tuple[ModelView, Path], number: str, tmp_path: Path
) -> None:
    view, path = exported
    shutil.copy(path, tmp_path / "plain.onnx")
    case = scaled(view, tmp_path)
    coded_path, steps = coded(case, number, tmp_path)
    ports = [v for v in onnx.load(str(coded_path)).graph.output if v.name != "logits"]
    assert len({value.type.tensor_type.elem_type for value in ports}) == 1
    assert decode_for_onnxruntime(coded_path, tmp_path / "decoded.onnx") == (number == "fp8")
    decoder = OrtDecoder(tmp_path / "decoded.onnx" if number == "fp8" else coded_path, threads=1)
    expected = texts(RoundingDecoder(case, steps, number))
    assert texts(decoder) == texts(decoder, batch=1) == expected != texts(TorchDecoder(view))
    sizes = {name: array.shape[2] for name, array in decoder.cached().items()}
    assert sizes["present.1.window5_key"] == SINK + 5


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_an_engine_drops_tokens_of_an_fp8_cache(exported: tuple[ModelView, Path], tmp_path: Path) -> None:
    """It gathers no fp8."""
    model = onnx.load(str(exported[1]))
    names = [entry.name for entry in find_cached(model)]
    quantize_cached(model, dict.fromkeys(names, 0.125), dict.fromkeys(names, "fp8"))
    model = to_precision(model, "bf16")
    code_caches(model.graph, "fp8")
    onnx.save(model, str(tmp_path / "half.onnx"))
    shapes = engine_shapes(tmp_path / "half.onnx", ExportSpec(context=100), {"sequence": 256})
    info = build_engine(tmp_path / "half.onnx", tmp_path / "e", resolve_target("sm120"), **shapes)
    assert info.listing is not None
    assert info.listing.fused_attention == 2 * 3


def test_a_graph_with_other_windows_is_found_out(exported: tuple[ModelView, Path]) -> None:
    view, path = exported
    other = ModelView.of(llama())
    surgery.apply(other, plan_of(other, 5, 3))
    shifted = replace(view.layout.attention[1], sink=SINK - 1, windows=(6,) * 4)
    surgery.write(other.attention[1], other.attention[1].read(), shifted)
    with pytest.raises(ExportError, match="output logits of the graph is off by"):
        check_decoder(other, path, np.arange(3, 27).reshape(2, 12))


def test_profiles_bound_what_windows_hold(exported: tuple[ModelView, Path]) -> None:
    _, path = exported
    spec = ExportSpec.model_validate({"sequence": {"min": 1, "opt": 8, "max": 16}, "context": 100})
    first = profiles_for(path, spec, {"sequence": 256})
    assert [shape[2] for shape in first["past_key_values.1.window5_key"].values()] == [0, 0, SINK + 5]
    assert first["past_key_values.0.key"]["max"][2] == 100
    single = decode_profiles(path, first)
    assert [shape[2] for shape in single["past_key_values.1.window5_key"].values()] == [0, SINK + 5, SINK + 5]
    assert single["past_key_values.2.key"]["opt"][2] == 50


def test_half_precision_keeps_the_text_and_engines_fuse_blocks(
    exported: tuple[ModelView, Path], tmp_path: Path
) -> None:
    _, path = exported
    half = tmp_path / "half.onnx"
    convert_precision(path, half, "fp16")
    with OrtDecoder(half, threads=1) as graph, OrtDecoder(path, threads=1) as full:
        prompts = [[5, 9, 7], [8, 8, 30, 31, 32, 33, 4]]
        found, expected = (generate(decoder, prompts, new_tokens=6) for decoder in (graph, full))
    assert found == expected
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: no engine can be built")
    shapes = engine_shapes(half, ExportSpec(context=100), {"sequence": 256})
    info = build_engine(half, tmp_path / "e", resolve_target("sm86"), **shapes)
    assert info.listing is not None
    # Of six blocks three have more than one query head; prompts and single tokens have kernels of their own.
    assert info.listing.fused_attention == 2 * 3


# ------------------------------------------------------------------------------------------------------------ the pass


def stream(family: str = "llama", **options: Any) -> EditPlan:
    view = ModelView.of(make_model(family))
    task, examples = samples(view, family)
    return make_plan(StreamHeadsPass.model_validate({"sink": 1, "recent": 2, **options}), view, task, examples)[0]


def streaming(plan: EditPlan) -> set[tuple[int, int]]:
    return {(edit.layer, head) for edit in plan.edits if isinstance(edit, StreamHeads) for head in edit.windows}


def test_heads_that_lose_nothing_stream_first() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = samples(view, "llama")
    group = view.layout.attention[1].group
    view.attention[1].read().output[:, :group] = 0.0  # what its readers see does not matter
    plan, _ = make_plan(StreamHeadsPass(ratio=1 / 6, sink=1, recent=2), view, task, examples)
    assert plan.edits == (StreamHeads(layer=1, windows={0: 2}, sink=1),)
    assert plan.notes[1].startswith("statistic of kv heads 0: 0, 1: ")


def test_ratio_random_and_lists_choose_heads_and_several_windows_go_by_score() -> None:
    assert len(streaming(stream(ratio=0.5))) == LAYERS * KV_HEADS // 2
    draws = {frozenset(streaming(stream(ratio=0.5, score="random", seed=seed))) for seed in range(4)}
    assert len(draws) > 1
    lists = [[1], [], [0]]
    assert streaming(stream(heads=lists)) == {(0, 1), (2, 0)}
    plan = stream(ratio=0.67, recent=[4, 2])
    found = [window for edit in plan.edits if isinstance(edit, StreamHeads) for window in edit.windows.values()]
    assert sorted(found) == [2, 2, 4, 4]


def test_what_the_cache_holds_is_counted_in_two_parts() -> None:
    view, teacher = (ModelView.of(make_model("llama")) for _ in range(2))
    task, examples = samples(view, "llama")
    run_pass(StreamHeadsPass(ratio=0.5, sink=1, recent=2), view, teacher, task, examples)
    assert kv_bytes_per_token(view) == kv_bytes_per_token(teacher) // 2
    assert kv_bytes_windows(view) == kv_bytes_per_token(teacher) // 2 * (1 + 2)
    assert kv_bytes_windows(teacher) == 0


def test_memory_counts_what_grows_and_what_does_not(tmp_path: Path) -> None:
    view = ModelView.of(make_model("llama"))
    surgery.apply(view, plan_of(view, 3))
    save_checkpoint(Checkpoint(module=view.module, source="x", kind="transformers", digest=""), view, tmp_path)
    found = memory_cost(str(tmp_path), memory=1 << 20, batch=3)
    model = found["models"]["model"]
    assert model["kv_bytes_per_token"] == kv_bytes_per_token(view)
    assert model["kv_bytes_windows"] == kv_bytes_windows(view) == (1 + 2 + 1) * 2 * 6 * (SINK + 3) * 2
    used = model["weight_bytes"] + 3 * (model["kv_bytes_windows"] + model["context"] * model["kv_bytes_per_token"])
    assert used <= 1 << 20 < used + 3 * model["kv_bytes_per_token"]
    console = Console(width=120, file=io.StringIO())
    console.print(memory_table(found))
    assert "cache of streaming heads, at most (fp16)" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.05}, r"ratio 0.05 of 6 kv heads lets 0 stream"),
        ({"ratio": 0.95}, r"ratio 0.95 of 6 kv heads lets 6 stream"),
        ({"ratio": 0.5, "recent": 200}, "no head loses anything by a window .*\n.*more than sink .* = 201 tokens"),
        ({"heads": [[0], [1]]}, r"heads names \[\[0\], \[1\]\]\n.*for each of 3 layers"),
        ({"heads": [[0], [1], [2]]}, "heads names .*\n.*each once"),
        ({"heads": [[0, 0], [], []]}, "heads names .*\n.*each once"),
        ({"heads": [[], [], []]}, "heads lets 0 of 6 kv heads stream"),
        ({"heads": [[0, 1]] * 3}, "heads lets 6 of 6 kv heads stream"),
    ],
)
def test_what_cannot_be_planned_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        stream(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either ratio or heads"),
        ({"ratio": 0.5, "heads": [[0]]}, "give either ratio or heads"),
        ({"ratio": 0.5, "recent": 0}, "recent: at least one number, each 1 or more"),
        ({"ratio": 0.5, "recent": []}, "recent: at least one number"),
        ({"ratio": 1.0}, "less than 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StreamHeadsPass.model_validate(options)


def test_edits_that_do_not_fit_are_refused() -> None:
    layout = ModelView.of(make_model("llama")).layout
    edit = StreamHeads(layer=0, windows={1: 3}, sink=1)
    for wrong, message in (
        ((replace(edit, windows={5: 3}),), "layer 0 has no kv head 5"),
        ((replace(edit, windows={1: 0}),), "a window of 0 tokens"),
        ((replace(edit, sink=-1),), "-1 first tokens"),
        ((edit, edit), "heads of layer 0 stream already"),
        ((edit, DropHeads(layer=0, query=(0, 1))), "heads of layer 0 stream already"),
        ((ClusterHeads(layer=0, clusters=((0, 1, 2, 3),)), edit), "layer 0 is clustered"),
    ):
        with pytest.raises(PlanError, match=message):
            EditPlan(edits=wrong).check(layout)
    assert EditPlan(edits=(replace(edit, windows={}),)).predict(layout) == layout


def test_models_without_a_head_for_all_tokens_have_no_cache_to_export() -> None:
    view = ModelView.of(make_model("llama"))
    every = tuple(StreamHeads(layer=i, windows={0: 3, 1: 3}, sink=1) for i in range(LAYERS))
    surgery.apply(view, EditPlan(edits=every))
    assert why_no_cache(view).startswith("no head sees all tokens")
    inputs = padded_inputs()
    decoder = TorchDecoder(view)
    decoder.begin(2)
    whole = decoder(*(inputs[name].numpy() for name in ("input_ids", "attention_mask", "position_ids")))
    found = torch.as_tensor(whole)[inputs["attention_mask"].bool()]
    assert largest_difference({"logits": found}, {"logits": logits(view, inputs)}) < TWIN


def test_limits_say_which_models_cannot_stream() -> None:
    for family, reason in (
        ("albert", "windows are known for decoders without an encoder, and for encoders"),
        ("gemma3", "its heads see the last tokens only already"),
    ):
        found = limits(ModelView.of(make_model(family)))
        assert [text for text in found if text.startswith(f"stream-heads: refused, because {reason}")]
    assert not any("stream-heads" in text for text in limits(ModelView.of(make_model("llama"))))


def test_a_layout_names_what_it_caches_by_window() -> None:
    layout = AttentionLayout(query=(0, 1, 2), kv=(0, 1, 2), head_dim=4, windows=(0, 8, 2), sink=1)
    assert layout.blocks == ((0, 1), (8, 1), (2, 1))
    assert [tensor.name for tensor in layout.cached] == [
        "key",
        "value",
        "window8_key",
        "window8_value",
        "window2_key",
        "window2_value",
    ]
    assert layout.cached[2] == CacheTensor(name="window8_key", shape=(1, 4), longest=9)
    assert layout.kv_width == 8


# ----------------------------------------------------------------------------------------------------------- the gates


def test_gates_keep_a_head_that_reads_far_back_and_are_the_same_every_time() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = samples(view, "llama")
    seen: list[int] = []
    span = Span(sink=1, recent=2, training=GateTraining(steps=12, penalty=0.01, rate=0.2))
    group = view.layout.attention[1].group
    view.attention[1].read().output[:, :group] = 0.0  # kv head 0 of layer 1 has no say
    before = [parameter.clone() for parameter in view.module.parameters()]
    gates = [
        train_gates(view, task, examples, span, span.training, batch_size=8, progress=seen.append)
        for _ in range(2)
        if span.training is not None
    ]
    assert all(torch.equal(one, other) for one, other in zip(*gates, strict=True))
    assert sum(seen) == 2 * len(examples)
    assert float(gates[0][1][0]) == min(float(gate.min()) for gate in gates[0]) < 0.2
    assert max(float(gate.max()) for gate in gates[0]) > 0.5
    assert all(torch.equal(one, other) for one, other in zip(before, view.module.parameters(), strict=True))


def test_heads_with_the_lowest_gates_stream_and_the_statistic_decides_among_equals() -> None:
    pass_ = StreamHeadsPass(ratio=0.5, sink=1, recent=2, score="gates", steps=3)
    view = ModelView.of(make_model("llama"))
    gates = tuple(torch.tensor(values) for values in ([0.3, 0.9], [0.0, 0.0], [0.0, 1.0]))
    costs = tuple(torch.tensor(values) for values in ([1.0, 1.0], [5.0, 4.0], [6.0, 1.0]))
    stats = HeadStats(values={Stat.STREAM_GATES: gates, Stat.WINDOW_COST: costs}, samples=1, digest="")
    assert streaming(pass_.plan(view, stats)) == {(1, 1), (1, 0), (2, 0)}
    assert streaming(pass_.model_copy(update={"ratio": 1 / 6}).plan(view, stats)) == {(1, 1)}
    plan = stream(score="gates", ratio=0.5, steps=3)
    assert plan.notes[0].startswith("gates of kv heads 0: ")


def test_models_without_output_embeddings_are_compared_by_the_signal_of_their_task() -> None:
    view = ModelView.of(make_model("llama"))
    task, examples = samples(view, "llama")
    view.module.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    training = GateTraining(steps=2, penalty=0.05)
    found = train_gates(view, task, examples, Span(sink=1, recent=2), training, batch_size=8)
    assert [len(gate) for gate in found] == [KV_HEADS] * LAYERS
