"""share-layers on decoders: followers read what their owner cached, and cache nothing themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from conftest import LAYERS, VOCABULARY, WIDTH, largest_difference, make_inputs, make_model, randomize
from test_decoder import PROMPTS, llama, torch_generates
from test_latent_attention import generate, logits
from test_passes import samples
from test_share_layers import HOWS, share

from headwise.errors import PlanError, SurgeryError
from headwise.export.decoder import decoder_to_onnx
from headwise.export.generate import generate as write
from headwise.export.onnx import ExportInfo
from headwise.export.ports import first_call
from headwise.export.precision import ExportSpec, convert_precision
from headwise.export.profiles import profiles_for
from headwise.export.stepping import OrtDecoder
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.gates.cost import graph_cost
from headwise.gates.model_cost import kv_bytes_per_token
from headwise.model import latent_surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.forward import run, to_torch
from headwise.model.rotation import rotate, with_past
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes.base import run_pass
from headwise.passes.share_layers import ShareLayersPass

HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"rank": 6}),
    ("llama", {}),
    ("llama", {"how": "reuse"}),
    ("qwen2", {"rank": 6}),
    ("qwen3", {"how": "mean"}),
    ("gemma2", {"how": "reuse"}),
    ("phi3", {"rank": 6}),
    ("gpt2", {"rank": 6}),
    ("gpt2", {"how": "reuse"}),
    ("opt", {"how": "mean"}),
    ("gpt-neox", {"rank": 6}),
    ("gpt-neox", {"how": "mean"}),
)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_text_is_the_same_with_a_cache_that_followers_have_no_part_in(family: str, options: dict[str, Any]) -> None:
    view, teacher, record = share(family, **options, refit=False)
    assert record.twin_error < 1e-5
    owners = [layer.owner for layer in view.layout.attention]
    # In Gemma 2, every second layer has a window.
    assert owners == ([None, None, 0] if family == "gemma2" else [None, 0, None])
    follower = owners.index(0)
    assert view.layout.attention[follower].cached == ()
    assert torch.equal(generate(view, use_cache=True), generate(view, use_cache=False))
    cached = [tensor for layer in view.layout.attention for tensor in layer.cached]
    assert kv_bytes_per_token(view) == 2 * sum(tensor.numbers for tensor in cached)
    if options.get("rank"):
        assert [tensor.name for tensor in view.layout.attention[0].cached] == ["latent"]
        assert kv_bytes_per_token(view) == kv_bytes_per_token(teacher) // LAYERS + 2 * 6
    model: Any = view.module
    cache = model(input_ids=make_inputs("llama")["input_ids"], use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers][follower] == 0


def test_beams_reorder_what_is_shared() -> None:
    for options in ({"rank": 6}, {"how": "reuse"}):
        view, _, _ = share("llama", **options)
        assert torch.equal(generate(view, use_cache=True, num_beams=2), generate(view, use_cache=False, num_beams=2))


def alike() -> ModelView:
    """A Llama whose layers 0 and 1 have equal keys and values and equal inputs: the block between adds nothing."""
    view = ModelView.of(make_model("llama"))
    first, second = view.attention[:2]
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            second.module.get_submodule(name).load_state_dict(first.module.get_submodule(name).state_dict())
        for silent in ("self_attn.o_proj", "mlp.down_proj"):
            first.block.get_submodule(silent).get_parameter("weight").zero_()
        second.block.get_submodule("input_layernorm").load_state_dict(
            first.block.get_submodule("input_layernorm").state_dict()
        )
    return view


@pytest.mark.parametrize("options", HOWS[:1] + HOWS[2:])
def test_layers_with_equal_inputs_and_weights_share_without_loss(options: dict[str, Any]) -> None:
    view, teacher = alike(), alike()
    task, examples = samples(view, "llama")
    run_pass(ShareLayersPass.model_validate({"refit": False, **options}), view, teacher, task, examples)
    found, wanted = (run(model.module, to_torch(examples.example_batch())) for model in (view, teacher))
    # A translator is pulled towards zero a little.
    assert largest_difference(found, wanted) < (1e-5 if options else 1e-2)


class Exported(NamedTuple):
    """A decoder whose first two layers share one state, and its graph."""

    view: ModelView
    path: Path
    info: ExportInfo


@pytest.fixture(scope="module", params=[{"rank": 10}, {"how": "reuse"}], ids=["latent", "heads"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    view = ModelView.of(llama())
    task, examples = samples(view, "llama")
    run_pass(ShareLayersPass.model_validate(request.param), view, ModelView.of(llama()), task, examples)
    path = tmp_path_factory.mktemp("shared") / "model.onnx"
    return Exported(view, path, decoder_to_onnx(view, np.array([[5, 9, 7], [3, 8, 6]]), path))


def test_a_graph_has_no_ports_and_no_projections_of_followers(exported: Exported) -> None:
    view, path, info = exported
    past = {name for name in info.inputs if name.startswith("past")}
    latent = view.layout.attention[0].latent > 0
    expected = {"0.latent"} if latent else {"0.key", "0.value"}
    assert past == {f"past_key_values.{name}" for name in expected | {"2.key", "2.value"}}
    if latent:
        assert info.inputs["past_key_values.0.latent"][1] == ("batch", 1, "past_sequence", 10)
        return
    inputs = {name: dims for name, (_, dims) in info.inputs.items()}
    row = first_call({"input_ids": np.ones((1, 6), np.int64)}, inputs)
    scopes = graph_cost(path, {name: array.shape for name, array in row.items()}).by_scope
    of_follower = {name.split(".")[-1] for name in scopes if "layers.1.self_attn" in name}
    assert of_follower == {"self_attn", "q_proj", "o_proj"}


def test_200_tokens_of_a_padded_batch_are_those_of_torch(exported: Exported) -> None:
    wanted = torch_generates(exported.view, PROMPTS, 200)
    with OrtDecoder(exported.path, threads=1) as graph:
        found = write(graph, PROMPTS, new_tokens=200, batch=4)
    assert [text.tokens for text in found] == wanted


@pytest.mark.skipif(not HAS_BUILDER, reason="tensorrt_rtx is not installed: no engine can be built")
def test_an_engine_has_fused_attention_in_every_layer(exported: Exported, tmp_path: Path) -> None:
    convert_precision(exported.path, tmp_path / "half.onnx", "fp16")
    shapes = profiles_for(tmp_path / "half.onnx", ExportSpec(context=100), {"sequence": 256})
    info = build_engine(tmp_path / "half.onnx", tmp_path / "engine", resolve_target("sm86"), profiles=shapes)
    assert info.listing is not None
    assert info.listing.fused_attention == 3


@pytest.mark.parametrize(("family", "options"), [("qwen2", {"rank": 6}), ("gpt2", {"how": "reuse"}), ("gpt2", {})])
def test_saved_loaded_and_copied_it_is_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(module=make_model(family), source="x", kind="transformers", digest="x")
    view, teacher = checkpoint.view(), ModelView.of(make_model(family))
    task, examples = samples(view, family)
    run_pass(ShareLayersPass.model_validate(options), view, teacher, task, examples)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.view().layout == view.layout
    for other in (loaded, loaded.copy()):
        assert torch.equal(logits(other.view()), logits(view))
        assert torch.equal(generate(other.view(), use_cache=True), generate(view, use_cache=True))


def test_tokens_of_the_past_are_turned_by_their_positions() -> None:
    angles = torch.tensor([1.0, 0.3, 0.01])
    position = torch.stack([torch.arange(9) - 2, torch.arange(9) + 400]).float()
    turns = (position[..., None] * angles).repeat(1, 1, 2)
    whole = 1.5 * turns.cos(), 1.5 * turns.sin()
    found = with_past((whole[0][:, 6:], whole[1][:, 6:]), angles, 9)
    for have, want in zip(found, whole, strict=True):
        assert torch.allclose(have, want, atol=1e-4)
    heads = torch.randn(2, 1, 9, 8)
    assert torch.equal(rotate(heads, whole)[..., 6:], heads[..., 6:])
    pair = torch.view_as_complex(torch.stack([heads[..., 1], heads[..., 4]], -1))
    turned = 1.5 * pair * torch.exp(1j * turns[:, None, :, 1])
    assert torch.allclose(rotate(heads, whole)[..., 1], turned.real, atol=1e-5)


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
        vocab_size=VOCABULARY,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    view = ModelView.of(randomize(transformers.LlamaForCausalLM(config)))
    task, examples = samples(view, "llama")
    with pytest.raises(PlanError, match="rotary positions of type dynamic"):
        run_pass(ShareLayersPass(), view, view, task, examples)
    run_pass(ShareLayersPass(how="reuse", refit=False), view, view, task, examples)


def test_sharing_that_is_not_exact_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break surgery on purpose: let the follower keep keys and values of its own."""
    monkeypatch.setattr(latent_surgery, "lend_cache", lambda *_: None)
    with pytest.raises(SurgeryError):
        share("llama", how="reuse")
