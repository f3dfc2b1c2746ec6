"""What a family record claims holds on a tiny model: shared kv heads, towers, limits, and an export of each."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import onnx
import pytest
import timm_like
import torch
import transformers
from conftest import (
    DECODERS,
    FACTORIES,
    GROUPED,
    NORMALISED,
    allowed,
    largest_difference,
    make_inputs,
    make_model,
)
from test_passes import samples
from test_share_kv import share
from torch import nn

from headwise.calibration.refit import fit_output
from headwise.calibration.stats import Stat, collect
from headwise.errors import UnsupportedModelError
from headwise.export.decoder import decoder_to_onnx
from headwise.export.onnx import to_onnx
from headwise.model import surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.families import FAMILIES
from headwise.model.forward import run
from headwise.model.grouped import GroupedAttention
from headwise.model.limits import limits
from headwise.model.saving import save_checkpoint
from headwise.model.timm_attention import unpack_timm
from headwise.model.view import ModelView
from headwise.passes.kv_weights import KVWeights

UNGROUPED = {"opt", "gpt-neox"}
"""Families whose class needs a kv head for every query head."""


def shared(family: str) -> ModelView:
    """A model with half of the kv heads in all layers but the first."""
    view = ModelView.of(make_model(family))
    counts = tuple(len(layer.kv) if i == 0 else len(layer.kv) // 2 for i, layer in enumerate(view.layout.attention))
    share(view, family, kv_heads=counts, grouping="adjacent", merge="mean" if family in NORMALISED else "subspace")
    return view


def checkpoint(family: str, module: nn.Module) -> Checkpoint:
    factory = FACTORIES.get(family)
    kind = "transformers" if factory is None else "module"
    return Checkpoint(module=module, source=family, kind=kind, digest="", factory=factory)


# ---------------------------------------------------------------------------------------------------- shared kv heads


@pytest.mark.parametrize("family", allowed("share-kv"))
def test_shared_heads_are_saved_bit_for_bit(family: str, tmp_path: Path) -> None:
    view, inputs = shared(family), make_inputs(family)
    with torch.no_grad():
        before = run(view.module, inputs)
    save_checkpoint(checkpoint(family, view.module), view, tmp_path)
    loaded = load_checkpoint(tmp_path)
    with torch.no_grad():
        assert largest_difference(before, run(loaded.module, inputs)) == 0.0
    assert loaded.view().layout == view.layout


@pytest.mark.parametrize(
    "family", sorted(set(allowed("share-kv")) - FACTORIES.keys() - {"gemma2"})
)  # capped scores: always eager
def test_eager_attention_takes_shared_heads_except_where_the_limits_say_so(family: str) -> None:
    view, inputs = shared(family), make_inputs(family)
    with torch.no_grad():
        fused = run(view.module, inputs)
        view.module.set_attn_implementation("eager")
        if any("not under eager" in limit for limit in limits(view)):
            with pytest.raises(RuntimeError, match="size of tensor"):
                run(view.module, inputs)
        else:
            # The first tokens are no padding, on which attention functions may differ.
            left, right = ({n: t[:, :3] for n, t in out.items()} for out in (fused, run(view.module, inputs)))
            assert largest_difference(left, right) < 1e-4


@pytest.mark.parametrize("family", sorted(UNGROUPED | {"phi3", "gemma3"}))
def test_generation_with_a_cache_gives_what_it_gives_without(family: str) -> None:
    view = shared(family)
    surgery.apply(view, EditPlan(edits=(DropHeads(layer=0, query=view.layout.attention[0].units()[0]),)))
    assert isinstance(view.attention[1].module, GroupedAttention) == (family in UNGROUPED)
    model: Any = view.module
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = make_inputs(family)["input_ids"][:1]
    texts = [model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*texts)
    assert texts[0].shape[1] == ids.shape[1] + 6


@pytest.mark.parametrize("family", sorted(UNGROUPED))
def test_a_module_in_another_s_place_trains_as_little(family: str) -> None:
    assert not any(parameter.requires_grad for parameter in shared(family).module.parameters())


def test_a_layer_has_counts_of_its_own_and_shares_the_rest_of_the_config() -> None:
    view = ModelView.of(make_model("phi3"))
    surgery.apply(view, EditPlan(edits=(DropHeads(layer=0, query=(0, 1)),)))
    module: Any = view.module
    counts = [layer.module.config.num_attention_heads for layer in view.attention]  # type: ignore[union-attr]
    assert counts == [2, 4, 4]
    assert module.config.num_attention_heads == 4
    twin: Any = copy.deepcopy(module)
    module.set_attn_implementation("eager")
    assert view.attention[0].module.config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert twin.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert twin.model.layers[0].self_attn.config.num_attention_heads == 2


def test_a_key_bias_under_capped_scores_is_not_dropped() -> None:
    view = ModelView.of(make_model("bert"))
    layer, moment = view.attention[0], torch.eye(conftest.WIDTH + 1, dtype=torch.float64)
    assert KVWeights.of(layer, moment, moment, fold=True, weighted=True).fold_key
    layer.family = replace(layer.family, soft_cap="cap")
    assert not KVWeights.of(layer, moment, moment, fold=True, weighted=True).fold_key


# ------------------------------------------------------------------------------------------- saving for stock classes


def test_a_count_that_the_stock_config_refuses_loads_through_headwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**conftest._DECODER, "num_key_value_heads": 4})
    model = transformers.LlamaForCausalLM(config).eval()
    view = ModelView.of(model)
    surgery.apply(view, EditPlan(edits=tuple(DropHeads(layer=i, query=(i,)) for i in range(3))))
    save_checkpoint(checkpoint("llama", model), view, tmp_path)
    inputs = make_inputs("llama")
    with torch.no_grad():
        assert largest_difference(run(model, inputs), run(load_checkpoint(tmp_path).module, inputs)) == 0.0


def test_saving_leaves_the_model_one_config(tmp_path: Path) -> None:
    view = ModelView.of(make_model("llama"))
    surgery.apply(view, EditPlan(edits=tuple(DropHeads(layer=i, query=(0, 1)) for i in range(3))))
    save_checkpoint(checkpoint("llama", view.module), view, tmp_path)
    model: Any = view.module
    assert model.config is model.model.config
    assert model.config.num_attention_heads == 4


# ------------------------------------------------------------------------------------------------------------ towers


def test_a_model_of_models_is_its_towers_with_records() -> None:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**conftest._DECODER),
        vision_config=transformers.SiglipVisionConfig(**conftest._VISION),
    )
    assert "siglip_vision_model" not in FAMILIES
    view = ModelView.of(transformers.LlavaForConditionalGeneration(config))
    assert {layer.path.split(".layers.")[0] for layer in view.attention} == {"model.language_model"}


def test_the_mask_of_texts_says_nothing_about_images() -> None:
    both = make_model("clip")
    view, inputs = ModelView.of(both), make_inputs("clip")
    _, examples = samples(view, "clip")
    task = samples(view, "clip")[0]
    stats = collect(view, task, examples, {Stat.HEAD_MEAN, Stat.INPUT_MOMENT})
    layer, seen = view.attention[-1], []
    with layer.watch_heads(seen.append), torch.no_grad():
        for batch in examples.batches(32):
            run(both, {name: torch.as_tensor(array) for name, array in batch.inputs.items()})
    tokens = torch.cat([heads.flatten(0, 1) for heads in seen])
    assert tokens.shape[0] > int(inputs["attention_mask"].sum())
    assert torch.allclose(stats[Stat.HEAD_MEAN][-1], tokens.double().mean(0))


def test_scores_between_the_rows_of_a_batch_are_no_signal_of_a_sample() -> None:
    view = ModelView.of(make_model("clip"))
    task, examples = samples(view, "clip")
    widths = set()
    for batch in (next(examples.batches(size)) for size in (2, 5)):
        with torch.no_grad():
            outputs = run(view.module, {name: torch.as_tensor(array) for name, array in batch.inputs.items()})
        assert outputs["logits_per_text"].shape[1] == len(batch.samples)
        widths.add(task.signal(outputs, batch).shape[1])
    assert widths == {32}


# ------------------------------------------------------------------------------------------------------------- refit


@pytest.mark.parametrize("family", ["gemma2", "dinov2", "timm"])
def test_a_layer_behind_a_norm_or_scale_is_fitted_to_its_own_output(family: str) -> None:
    student, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    surgery.apply(student, EditPlan(edits=(DropHeads(layer=0, query=student.layout.attention[0].units()[0]),)))
    assert not student.attention[1].direct
    _, examples = samples(student, family)
    examples = examples if family in DECODERS else replace(examples, rows=examples.rows[:20])
    outputs: list[list[torch.Tensor]] = [[], []]
    for model, seen in zip((student, teacher), outputs, strict=True):
        with model.attention[1].watch_output(seen.append), torch.no_grad():
            for batch in examples.batches(32):
                valid = batch.valid()
                run(model.module, {name: torch.as_tensor(array) for name, array in batch.inputs.items()})
                seen[-1] = seen[-1].flatten(0, 1) if valid is None else seen[-1][torch.as_tensor(valid)]
    ours, theirs = (torch.cat(seen).double() for seen in outputs)
    fit = fit_output(student, teacher, 1, examples)
    assert fit.before == pytest.approx(float((ours - theirs).square().sum() / theirs.square().sum()), rel=1e-3)


def test_a_block_without_layer_scale_adds_its_output_as_it_is() -> None:
    model: Any = timm_like.timm_vit()
    model.blocks[1].ls1 = model.blocks[2].ls2 = nn.Identity()
    view = ModelView.of(model)
    assert [layer.direct for layer in view.attention] == [False, True, False]
    assert [mlp.record.residual for mlp in view.mlp] == ["", "", "norm2"]
    model.blocks[0].mlp.norm = nn.LayerNorm(48)
    assert [mlp.path for mlp in ModelView.of(model).mlp] == ["blocks.1", "blocks.2"]


# -------------------------------------------------------------------------------------------------------------- timm


def test_normalised_queries_of_timm_are_known() -> None:
    block = nn.Module()
    block.attn = timm_like.timm_attention(16, 2, qk_norm=True)
    holder = nn.Sequential(block)
    assert any("queries and keys are normalised" in limit for limit in limits(ModelView.of(holder)))


def test_timm_attention_that_mixes_heads_is_refused() -> None:
    for option, value in (("norm", nn.LayerNorm(16)), ("gate", nn.Linear(16, 16))):
        module = nn.Sequential(timm_like.timm_attention(16, 2))
        setattr(module[0], option, value)
        with pytest.raises(UnsupportedModelError, match="outputs of all heads together"):
            unpack_timm(module)


def test_timm_attention_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(timm_like.timm_attention(16, 2))
    original = type(module[0])
    right = original.forward
    monkeypatch.setattr(original, "forward", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    with pytest.raises(UnsupportedModelError, match="does not compute what headwise knows of it"):
        unpack_timm(module)


# ------------------------------------------------------------------------------------------------------------ limits


def test_a_cap_and_a_window_that_a_config_turns_off_are_no_limits() -> None:
    config = {**conftest._GEMMA, "attn_logit_softcapping": None, "layer_types": ["full_attention"] * 3}
    view = ModelView.of(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config)))
    assert not [limit for limit in limits(view) if "capped" in limit or "a token sees" in limit]


def test_limits_name_the_layers_that_they_hold_for() -> None:
    found = limits(ModelView.of(make_model("gemma2")))
    assert any("scores are capped at 5 by a tanh" in limit and "(layers" not in limit for limit in found)
    assert any("the last 3 tokens only" in limit and limit.endswith("(layers 0, 2)") for limit in found)


def test_the_merges_that_are_refused_are_a_limit(family: str) -> None:
    told = any("mean or first only" in limit for limit in limits(ModelView.of(make_model(family))))
    assert told == (family in NORMALISED), "test_share_kv.py: these and no others are refused"


def test_no_saving_limit_where_plain_transformers_loads_the_result(family: str) -> None:
    told = any(limit.startswith("saving:") for limit in limits(ModelView.of(make_model(family))))
    assert told == (family not in conftest.STOCK | FACTORIES.keys())


# ------------------------------------------------------------------------------------------------------------ export


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes as long as a model has layers; ``clip`` keeps one per tower."""
    for size in conftest.SIZES:
        monkeypatch.setitem(size, "num_hidden_layers", 1)


EXPORTED = (
    *("electra", "clip", "deit", "dinov2", "timm", "torch"),
    *("gpt2", "opt", "gpt-neox", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"),
)


@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize("family", EXPORTED)
def test_pruned_and_shared_heads_stay_so_in_the_graph(family: str, tmp_path: Path) -> None:
    view = ModelView.of(make_model(family))
    edits = [] if family in GROUPED else [DropHeads(layer=i, query=(1, 3)) for i in range(len(view.attention))]
    surgery.apply(view, EditPlan(edits=tuple(edits)))
    share(view, family, kv_heads=1, merge="first" if family in NORMALISED else "subspace")
    inputs = {name: tensor.numpy() for name, tensor in make_inputs(family).items()}
    dynamic = {name: (0, 1) if array.ndim == 2 else (0,) for name, array in inputs.items()}
    path = tmp_path / "model.onnx"
    if family in DECODERS:
        info = decoder_to_onnx(view, inputs["input_ids"], path)
    else:
        info = to_onnx(view.module, inputs, path, dynamic=dynamic)
    assert max(found.max_abs for found in info.parity) < 1e-4
    graph = onnx.load(str(path)).graph
    values = [*graph.value_info, *graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    heads = [[shapes[name][1] for name in node.input[:3]] for node in graph.node if node.op_type == "Attention"]
    fused = [[len(layer.query), 1, 1] for layer in view.layout.attention]
    no_operator = any("the graph has no Attention operator" in limit for limit in limits(view))
    assert heads == ([] if no_operator else fused)
    assert no_operator == (family == "gemma2")
    assert np.isfinite(info.parity[0].max_abs)
