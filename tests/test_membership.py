"""Clusters that every sample forms from its first tokens: those of scipy, blind to padding, the same in every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import HEADS, LAYERS, largest_difference, make_inputs, make_model
from pydantic import ValidationError
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from test_passes import samples

from headwise.errors import PlanError
from headwise.export.onnx import to_onnx
from headwise.model.attend import bind, form
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import ClusterOnline, EditPlan
from headwise.model.forward import run
from headwise.model.layout import AttentionLayout
from headwise.model.membership import FIRST, membership
from headwise.model.saving import save_checkpoint
from headwise.model.surgery import apply
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.cluster_heads import ClusterHeadsPass
from headwise.tolerances import TWIN

DECODERS = ("gpt2", "llama", "qwen3")
TOKENS = 9


def heads(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, count, TOKENS, 8, generator=generator) for _ in range(2))  # type: ignore[return-value]


def members(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return membership(query, key, seen, count, query.shape[-1] ** -0.5)


def online(family: str, count: int = 2) -> ModelView:
    view = ModelView.of(make_model(family))
    apply(view, EditPlan(edits=tuple(ClusterOnline(layer=index, count=count) for index in range(LAYERS))))
    return view


@pytest.mark.parametrize(("total", "count"), [(6, 3), (12, 4), (8, 1), (5, 5)])
def test_clusters_are_those_of_average_linkage(total: int, count: int) -> None:
    query, key = heads(total)
    representatives, index = members(query, key, torch.ones(1, TOKENS, dtype=torch.bool), count)
    assert representatives.shape == (3, count)
    hidden = torch.ones(FIRST, FIRST, dtype=torch.bool).triu(1)
    for row in range(3):
        scores = query[row, :, :FIRST] @ key[row, :, :FIRST].mT * 8**-0.5
        maps = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1).flatten(1)
        distance = (1 - torch.nn.functional.cosine_similarity(maps[:, None], maps[None], dim=-1)).fill_diagonal_(0)
        labels = fcluster(linkage(squareform(distance.numpy(), checks=False), "average"), count, "maxclust")
        together = index[row][:, None] == index[row][None]
        assert np.array_equal(together.numpy(), labels[:, None] == labels[None])
        for head, used in enumerate(representatives[row][index[row]].tolist()):
            group = np.flatnonzero(labels == labels[head])
            spread = distance[group][:, group].sum(0)
            assert float(spread[list(group).index(used)]) == pytest.approx(float(spread.min()), abs=1e-6)


def test_padding_in_front_is_not_among_the_first_tokens() -> None:
    query, key = heads(6)
    padded = [torch.cat([torch.randn(3, 6, 4, 8), found], dim=2) for found in (query, key)]
    seen = torch.arange(TOKENS + 4)[None].expand(3, -1) >= 4
    plain = members(query, key, torch.ones(1, TOKENS, dtype=torch.bool), 3)
    for left, right in zip(plain, members(padded[0], padded[1], seen, 3), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("family", DECODERS)
def test_as_many_clusters_as_heads_is_the_original(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    with torch.no_grad():
        before = run(view.module, inputs)
        for layer in view.attention:
            old = layer.layout
            bind(layer.caller, AttentionLayout(query=old.query, kv=old.kv, head_dim=old.head_dim, online=HEADS))
        assert largest_difference(before, run(view.module, inputs)) < TWIN
        bind(view.attention[0].caller, AttentionLayout(query=old.query, kv=old.kv, head_dim=old.head_dim, online=2))
        assert largest_difference(before, run(view.module, inputs)) > 100 * TWIN


@pytest.mark.parametrize("family", DECODERS)
def test_the_pass_is_exact_and_both_forms_agree(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    task, examples = samples(view, family)
    pass_ = ClusterHeadsPass(clusters=2, membership="online", affinity="maps")
    record = run_pass(pass_, view, ModelView.of(make_model(family)), task, examples)
    assert [layer.online for layer in record.after.attention] == [2] * LAYERS
    with torch.no_grad():
        gathered = run(view.module, inputs)
        with form("fused"):
            assert largest_difference(gathered, run(view.module, inputs)) < 1e-4


def test_a_padded_batch_gives_what_single_samples_give() -> None:
    view = online("llama")
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    with torch.no_grad():
        batch = view.module(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        alone = view.module(input_ids=ids[1:, 3:]).logits
    assert torch.allclose(batch[1:, 3:], alone, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_membership_is_frozen_while_text_is_generated(family: str) -> None:
    module = online(family).module
    assert isinstance(module, transformers.GenerationMixin)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [module.generate(ids, use_cache=cache, **given) for cache in (True, False)]
    assert torch.equal(*texts)


def test_a_checkpoint_and_a_graph_decide_as_the_model_does(tmp_path: Path) -> None:
    view, inputs = online("llama"), make_inputs("llama")
    save_checkpoint(Checkpoint(module=view.module, source="test", kind="transformers", digest=""), view, tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.view().layout == view.layout
    with torch.no_grad():
        assert largest_difference(run(view.module, inputs), run(again.module, inputs)) == 0.0
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    dynamic = dict.fromkeys(arrays, (0, 1))
    info = to_onnx(again.module, arrays, tmp_path / "model.onnx", dynamic=dynamic)
    assert max(found.max_abs for found in info.parity) < 1e-4
    assert len({found.shape for found in info.parity}) > 2


def test_an_encoder_is_refused() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    pass_ = ClusterHeadsPass(clusters=2, membership="online", affinity="maps")
    with pytest.raises(PlanError, match="every token sees later ones"):
        make_plan(pass_, view, task, examples)


def test_other_affinities_than_maps_are_refused() -> None:
    with pytest.raises(ValidationError, match="set affinity: maps"):
        ClusterHeadsPass(clusters=2, membership="online")
