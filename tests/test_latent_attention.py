"""Latent attention of decoders: what is rotary stays exact, the cache holds latents only, both forms agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, make_inputs, make_model
from pydantic import ValidationError
from test_latent_kv import compress

from headwise.calibration.rotary import head_components, importance, keep_rotary, merged_components
from headwise.errors import PlanError, SurgeryError
from headwise.export.decoder import decoder_to_onnx
from headwise.gates.model_cost import kv_bytes_per_token
from headwise.model import latent_swap
from headwise.model.forward import run
from headwise.model.latent_attention import LatentAttention
from headwise.model.latent_form import latent_form
from headwise.model.view import ModelView
from headwise.passes.latent_kv import LatentKVPass
from headwise.passes.latent_rotary import angles

ROTARY = {"llama": 6, "qwen2": 6, "mistral": 6, "gpt-neox": 4, "phi3": 4}
"""Coordinates of a head that positions turn; in the last two a part of the head."""
HEADS = {"llama": 2, "qwen2": 2, "mistral": 2, "gpt-neox": 4, "phi3": 2}
PADDED = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])


def logits(view: ModelView, **options: Any) -> torch.Tensor:
    """Of real tokens, the second row padded on the left."""
    inputs = {"input_ids": make_inputs("llama")["input_ids"], "attention_mask": PADDED}
    found = run(view.module, {**inputs, **options})["logits"]
    return found[PADDED.bool()]


def generate(view: ModelView, *, use_cache: bool, **options: Any) -> torch.Tensor:
    model: Any = view.module
    ids = make_inputs("llama")["input_ids"]
    given = {"input_ids": ids, "attention_mask": PADDED, "eos_token_id": None, "pad_token_id": 0}
    found: torch.Tensor = model.generate(**given, max_new_tokens=12, do_sample=False, use_cache=use_cache, **options)
    return found


@pytest.mark.parametrize("family", list(ROTARY))
@pytest.mark.parametrize("options", [{}, {"basis": "real"}, {"route": "heads"}])
def test_keeping_all_keys_rotary_loses_nothing(family: str, options: dict[str, Any]) -> None:
    every = ROTARY[family] * HEADS[family]
    view, teacher, record = compress(family, rank=10_000, rotary=every, refit=False, **options)
    assert all(isinstance(layer.module, LatentAttention) for layer in view.attention)
    assert {layer.rotary for layer in view.layout.attention} == {every}
    assert float((logits(view) - logits(teacher)).abs().max()) < 1e-4
    assert record.twin_error < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_keys_that_are_rotated_behind_a_full_latent_lose_nothing(family: str) -> None:
    view, teacher, record = compress(family, rank=10_000, route="rebuild", refit=False)
    assert float((logits(view) - logits(teacher)).abs().max()) < 1e-4
    assert record.twin_error < 1e-5
    assert {layer.rotary for layer in view.layout.attention} == {0}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_without_rotary_positions_a_full_latent_loses_nothing(family: str) -> None:
    view, teacher, _ = compress(family, rank=10_000, refit=False)
    assert float((logits(view) - logits(teacher)).abs().max()) < 1e-4
    assert {layer.rotary for layer in view.layout.attention} == {0}


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"rotary": 4}),
    ("llama", {"rotary": 4, "fold": 3, "basis": "real"}),
    ("qwen2", {"rotary": 4, "route": "heads"}),
    ("qwen2", {"route": "rebuild"}),
    ("mistral", {"rotary": 4}),
    ("phi3", {"rotary": 4}),
    ("gpt-neox", {"rotary": 8, "route": "heads"}),
    ("gpt2", {}),
    ("opt", {}),
)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_text_is_the_same_with_a_cache_and_absorbed(family: str, options: dict[str, Any]) -> None:
    view, _, _ = compress(family, rank=8, **options)
    with latent_form("absorbed"):
        absorbed = logits(view)
    assert float((absorbed - logits(view)).abs().max()) < 1e-4
    assert torch.equal(generate(view, use_cache=True), generate(view, use_cache=False))


def test_beams_reorder_latents() -> None:
    view, _, _ = compress("llama", rank=8, rotary=4)
    assert torch.equal(generate(view, use_cache=True, num_beams=2), generate(view, use_cache=False, num_beams=2))


@pytest.mark.parametrize(("route", "rotary"), [("merge", (2, 1, 7, 4)), ("heads", (2, 2, 7, 2))])
def test_a_cache_holds_latents_and_rotary_keys_only(route: str, rotary: tuple[int, ...]) -> None:
    view, teacher, _ = compress("llama", rank=8, rotary=4, route=route)
    model: Any = view.module
    cache = model(input_ids=make_inputs("llama")["input_ids"], use_cache=True).past_key_values
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    assert shapes == [((2, 1, 7, 8), rotary)] * LAYERS
    named = [(tensor.name, tensor.dims(2, 7)) for tensor in view.layout.attention[0].cached]
    assert named == [("latent", (2, 1, 7, 8)), ("rotary_key", rotary)]
    assert kv_bytes_per_token(view) == 2 * LAYERS * 12
    assert kv_bytes_per_token(teacher) == 2 * LAYERS * 24


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {"rotary": 4}), ("llama", {"rotary": 4, "route": "heads"}), ("gpt2", {})]
)
def test_a_graph_with_a_cache_takes_and_gives_latents(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    view, _, _ = compress(family, rank=(8, 5, 6), **options)
    ids = make_inputs("llama")["input_ids"].numpy()
    info = decoder_to_onnx(view, ids, tmp_path / "model.onnx")
    assert info.inputs["past_key_values.1.latent"][1][1::2] == (1, 5)
    rotary = {"present.0.rotary_key"} if options else set()
    assert {name for name in info.outputs if name.startswith("present.0")} == {"present.0.latent"} | rotary
    assert max(parity.max_abs for parity in info.parity) < 1e-4


def test_up_projections_are_absorbed_at_decode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    view, _, _ = compress("llama", rank=8, rotary=4)
    seen: list[str] = []
    for name in ("_absorbed", "_unabsorbed"):
        right = getattr(LatentAttention, name)

        def watched(self: LatentAttention, *args: Any, name: str = name, right: Any = right) -> Any:
            seen.append(name)
            return right(self, *args)

        monkeypatch.setattr(LatentAttention, name, watched)
    generate(view, use_cache=True)
    assert seen == ["_unabsorbed"] * LAYERS + ["_absorbed"] * LAYERS * 11


def test_a_complex_basis_finds_heads_that_are_turned_against_each_other() -> None:
    """Keys of one head are those of the other, turned by an angle of each pair's own: one rotary key holds both."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    turned = torch.exp(1j * torch.arange(4).double())[:, None] * torch.complex(first[:4], first[4:])
    keys = torch.stack([first, torch.cat([turned.real, turned.imag])])
    weights = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
    moment = torch.eye(16, dtype=torch.float64)
    lost = {}
    for basis in ("real", "complex"):
        components = merged_components(keys, moment, weights, fold=1, basis=basis)
        parts = keep_rotary(keys, components, components.energy, 8, 8)
        lost[basis] = float(parts.rest.square().sum() / keys.square().sum())
    assert lost["complex"] < 1e-12
    assert lost["real"] > 0.05


def test_slow_frequencies_are_worth_less_rotation() -> None:
    keys = torch.eye(4, dtype=torch.float64)[None]
    weights, moment = torch.eye(4, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)
    components = head_components(keys, moment, weights)
    fast = torch.tensor([1.0, 1e-4])
    worth = importance(components, fast, 64, "change")
    assert worth[0] > 1000 * worth[1]
    assert torch.equal(importance(components, fast, 64, "norm"), components.energy)
    parts = keep_rotary(keys, components, worth, 2, 4)
    assert parts.frequencies.tolist() == [[0]]
    assert parts.rest.shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary": 3}, "a multiple of 2 up to 12"),
        ({"rotary": 14}, "a multiple of 2 up to 12"),
        ({"rotary": 6, "route": "heads"}, "a multiple of 4 up to 12"),
    ],
)
def test_rotary_keys_come_in_pairs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match="rotary:") as refused:
        compress("llama", rank=8, **options)
    assert message in str(refused.value)


@pytest.mark.parametrize("options", [{"rotary": 0}, {"fold": 0}, {"distance": 1}, {"route": "rebuild", "rotary": 4}])
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LatentKVPass.model_validate({"rank": 8, **options})


def test_a_model_without_frequencies_is_refused() -> None:
    view = ModelView.of(make_model("llama"))
    with pytest.raises(PlanError, match="no module of the model holds 99 rotary frequencies"):
        angles(view, 99)


def test_without_options_a_head_of_rotary_keys_stays() -> None:
    view, _, _ = compress("llama", budget=0.75)
    assert {layer.rotary for layer in view.layout.attention} == {6}
    assert sum(layer.kv_width for layer in view.layout.attention) == round(0.75 * 24 * LAYERS)


def test_surgery_that_is_not_exact_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break surgery on purpose: give the cached form other rotary keys than its twin has."""
    right = latent_swap.swap
    calls: list[int] = []

    def wrong(view: Any, layout: Any, payload: Any) -> None:
        right(view, layout, payload)
        calls.append(1)
        if len(calls) > LAYERS:  # behind the twins
            with torch.no_grad():
                view.module.rotary_key.weight.mul_(1.5)

    monkeypatch.setattr(latent_swap, "swap", wrong)
    monkeypatch.setattr("headwise.model.latent_surgery.swap", wrong)
    with pytest.raises(SurgeryError, match="differs from its exact twin"):
        compress("llama", rank=8, rotary=4)
