"""Decoders with their cache as inputs and outputs: one graph that reads prompts and continues them as torch does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from conftest import VOCABULARY, make_model, randomize

from headwise.errors import DataError, ExportError
from headwise.export.angles import Angles
from headwise.export.decoder import caches, check_decoder, decoder_to_onnx
from headwise.export.generate import generate, likeliest, sampled
from headwise.export.kv import fold_channels
from headwise.export.onnx import ExportInfo
from headwise.export.ports import check_ports, first_call
from headwise.export.precision import ExportSpec, convert_precision
from headwise.export.profiles import decode_profiles, engine_shapes, profiles_for
from headwise.export.runners import OrtRunner, TorchRunner
from headwise.export.stepping import OrtDecoder, TorchDecoder
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.gates.cost import graph_cost
from headwise.model import surgery
from headwise.model.cache import CacheLayout, CacheTensor, next_past
from headwise.model.decoder import empty_past, make_cache, positions, read_cache, why_no_cache
from headwise.model.edits import ClusterHeads, ClusterOnline, DropHeads, EditPlan, ShareKV
from headwise.model.view import ModelView

HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None
WIDTH, HEADS, HEAD_DIM = 32, 4, 12
PROMPTS = [[5, 9, 7], [3], [8, 8, 30, 31, 32, 33, 4], [11, 12]]


def llama(seed: int = 0) -> transformers.LlamaForCausalLM:
    """Three layers of multi-head attention, heads wide enough for a fused kernel."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = randomize(transformers.LlamaForCausalLM(config))
    assert isinstance(model, transformers.LlamaForCausalLM)
    return model


class Exported(NamedTuple):
    """A decoder whose layers cache different things, and its graph."""

    view: ModelView
    path: Path
    info: ExportInfo


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Layer 0 has lost two heads, layer 1 shares keys and values, layer 2 has fewer keys than values."""
    view = ModelView.of(llama())
    edits = (
        DropHeads(layer=0, query=(1, 2)),
        ShareKV(layer=1, groups=((0, 1, 2, 3),)),
        ClusterHeads(layer=2, clusters=((2, 0), (1, 3))),
    )
    surgery.reshape(view, EditPlan(edits=edits).predict(view.layout))
    randomize(view.module)
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    return Exported(view, path, decoder_to_onnx(view, np.array([[5, 9, 7], [3, 8, 6]]), path))


# ----------------------------------------------------------------------------------------------------------- the graph


def test_inputs_and_outputs_are_what_the_layers_cache(decoder: Exported) -> None:
    past = {0: (2, 2), 1: (1, 1), 2: (2, 4)}
    expected = {
        f"{layer}.{name}": ("FLOAT", ("batch", count, "{}", HEAD_DIM))
        for layer, counts in past.items()
        for name, count in zip(("key", "value"), counts, strict=True)
    }
    tokens = dict.fromkeys(("input_ids", "position_ids"), ("INT64", ("batch", "sequence")))
    assert decoder.info.inputs == {
        **tokens,
        "attention_mask": ("INT64", ("batch", "total_sequence")),
        **{f"past_key_values.{n}": (t, ("batch", d[1], "past_sequence", d[3])) for n, (t, d) in expected.items()},
    }
    assert decoder.info.outputs == {
        "logits": ("FLOAT", ("batch", "sequence", VOCABULARY)),
        **{f"present.{n}": (t, ("batch", d[1], "total_sequence", d[3])) for n, (t, d) in expected.items()},
    }
    numbers = sum(layer.kv_width for layer in decoder.view.layout.attention)
    assert decoder.view.layout.cache.numbers == numbers == HEAD_DIM * (2 + 2 + 1 + 1 + 2 + 4)


def test_shared_keys_and_values_are_not_repeated_in_memory(decoder: Exported) -> None:
    graph = onnx.load(str(decoder.path)).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.value_info, *graph.output]}
    heads = [[shapes[name][1] for name in node.input[:3]] for node in graph.node if node.op_type == "Attention"]
    assert heads == [[2, 2, 2], [4, 1, 1]]  # layer 2 gathers the weights of its representatives


def test_the_graph_is_the_model_for_prompts_single_tokens_and_padding(decoder: Exported) -> None:
    parity = decoder.info.parity
    assert len({found.shape for found in parity}) == 5
    assert {found.output for found in parity} > {"logits"}
    assert max(found.max_abs for found in parity) < 1e-4


def test_a_graph_of_another_model_is_found_out(decoder: Exported) -> None:
    other = ModelView.of(llama(seed=1))
    surgery.reshape(other, decoder.view.layout)
    with pytest.raises(ExportError, match=r"output logits of the graph is off by .* padded on the left"):
        check_decoder(other, decoder.path, np.array([[5, 9, 7, 4, 3], [3, 8, 6, 5, 4]]))


def test_sizes_that_are_not_those_of_the_layout_are_refused(decoder: Exported) -> None:
    graph = ir.load(decoder.path).graph
    check_ports(graph, decoder.view.layout.cache)
    key, value = (CacheTensor(name=name, shape=(3, HEAD_DIM)) for name in ("key", "value"))
    with pytest.raises(ExportError, match=r"input past_key_values\.0\.key .*\n.*'batch', 3, 'past_sequence', 12"):
        check_ports(graph, CacheLayout(layers=((key, value),)))
    latent = CacheTensor(name="latent", shape=(6,))
    assert latent.dims("batch", 7) == ("batch", 7, 6)
    with pytest.raises(ExportError, match=r"input past_key_values\.0\.latent of the graph is missing"):
        check_ports(graph, CacheLayout(layers=((latent,), ())))


def test_a_layer_that_reads_the_cache_of_another_has_no_inputs_of_its_own() -> None:
    layout = CacheLayout(
        layers=((CacheTensor(name="latent", shape=(6,)),), (), (CacheTensor(name="key", shape=(2, 4)),))
    )
    assert list(layout.past()) == ["past_key_values.0.latent", "past_key_values.2.key"]
    assert list(map(next_past, layout.present())) == list(layout.past())
    assert layout.numbers == 6 + 8


def test_a_layer_caches_up_to_two_tensors_of_any_shape() -> None:
    latent, key = CacheTensor(name="latent", shape=(6,)), CacheTensor(name="rotary_key", shape=(2, 4))
    layout = CacheLayout(layers=((latent,), (), (latent, key)))
    cache = make_cache(layout, empty_past(layout, 3))
    new = {tensor: torch.randn([int(dim) for dim in tensor.dims(3, 2)]) for tensor in (latent, key)}
    for total in (2, 4):
        alone, nothing = cache.update(new[latent], new[latent][..., :0], 0)
        assert (alone.shape, nothing.shape) == ((3, total, 6), (3, total, 0))
        both = cache.update(new[latent], new[key], 2)
        assert [tensor.shape for tensor in both] == [(3, total, 6), (3, 2, total, 4)]
    found = read_cache(layout, cache)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: tensor.dims(3, 4) for name, tensor in layout.present().items()
    }
    again = make_cache(layout, {next_past(name): tensor for name, tensor in found.items()})
    assert again.get_seq_length() == 4


def test_positions_are_counted_from_the_first_real_token() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert positions(mask, 2).tolist() == [[1, 2], [2, 2]]


# ------------------------------------------------------------------------------------------------- text, token by token


def torch_generates(view: ModelView, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What ``generate`` of transformers gives for the batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    module: Any = view.module
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
    found: list[list[int]] = module.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    return found


def test_200_tokens_of_a_padded_batch_are_those_of_torch(decoder: Exported) -> None:
    expected = torch_generates(decoder.view, PROMPTS, 200)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    with OrtDecoder(decoder.path, threads=1) as graph:
        found = generate(graph, PROMPTS, new_tokens=200, batch=4)
    assert [text.tokens for text in found] == expected
    assert {text.ended for text in found} == {"length"}


def test_prompts_read_in_parts_and_in_other_batches_give_the_same_text(
    decoder: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OrtDecoder(decoder.path, threads=1) as graph:
        whole = generate(graph, PROMPTS, new_tokens=12, batch=4)
        monkeypatch.setattr("headwise.export.generate.PART", 3)
        assert generate(graph, PROMPTS, new_tokens=12, batch=3) == whole
    assert generate(TorchDecoder(decoder.view), PROMPTS, new_tokens=12, batch=1) == whole


def test_texts_end_at_the_end_token_or_where_the_model_takes_no_more(decoder: Exported) -> None:
    seen: list[tuple[int, int]] = []
    with OrtDecoder(decoder.path, threads=1) as graph:
        free = generate(graph, PROMPTS, new_tokens=9, see=lambda number, token: seen.append((number, token)))
        assert [token for number, token in seen if number == 2] == free[2].tokens
        end = free[1].tokens[4]
        ended = generate(graph, PROMPTS, new_tokens=9, ends={end})
        for full, text in zip(free, ended, strict=True):
            assert text.tokens == full.tokens[: full.tokens.index(end)] if end in full.tokens else full.tokens
        assert ended[1].ended == "end"
        short = generate(graph, PROMPTS, new_tokens=9, longest=8)
        assert (short[2].tokens, short[2].ended) == (free[2].tokens[:2], "context")
        assert (short[1].tokens, short[1].ended) == (free[1].tokens[:8], "context")
        assert short[0].ended == "context"
        with pytest.raises(DataError, match="prompt 2 has 7 tokens\n  expected: at least 1 and at most 6"):
            generate(graph, PROMPTS, new_tokens=9, longest=6)
        with pytest.raises(DataError, match="prompt 1 has 0 tokens"):
            generate(graph, [[4], []], new_tokens=9)


def test_drawn_tokens_follow_their_probability_and_do_not_depend_on_the_batch(decoder: Exported) -> None:
    scores = np.log(np.array([0.5, 0.0625, 0.25, 0.1875], np.float32))
    choose = sampled(1.0, seed=3)
    counts = np.bincount([choose(0, scores) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.0625, 0.25, 0.1875], atol=0.03)
    assert {sampled(1.0, 2, seed)(0, scores) for seed in range(50)} == {0, 2}
    assert {sampled(0.01, None, seed)(0, scores) for seed in range(20)} == {0} == {likeliest(0, scores)}
    with OrtDecoder(decoder.path, threads=1) as graph:
        texts = [generate(graph, PROMPTS, new_tokens=6, batch=b, choose=sampled(0.8, 10, 1)) for b in (1, 4)]
        assert texts[0] == texts[1] != generate(graph, PROMPTS, new_tokens=6, choose=sampled(0.8, 10, 2))


def test_a_graph_without_a_cache_cannot_continue_a_text(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 21]> g (int64[B, S] input_ids) => (int64[B, S] y) { y = Neg(input_ids) }'
    )
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "g.onnx"))
    with pytest.raises(DataError, match=r"g\.onnx keeps nothing between its calls"):
        OrtDecoder(tmp_path / "g.onnx")


# --------------------------------------------------------------------------------- gates, precisions, costs and engines


def test_gates_run_whole_sequences_on_the_same_graph(decoder: Exported) -> None:
    ids = np.array([[5, 9, 7, 4, 6], [3, 8, 6, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    expected = TorchRunner(decoder.view.module)(batch)["logits"]
    with OrtRunner(decoder.path) as runner:
        found = runner(batch)
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"][ids > 0], expected[ids > 0], atol=1e-4)
    # Without a mask, all tokens are real.
    with OrtRunner(decoder.path) as runner:
        np.testing.assert_allclose(runner({"input_ids": ids[:1]})["logits"], expected[:1], atol=1e-4)


def test_work_is_counted_with_an_empty_past(decoder: Exported) -> None:
    inputs = {name: dims for name, (_, dims) in decoder.info.inputs.items()}
    row = first_call({"input_ids": np.ones((1, 6), np.int64)}, inputs)
    assert row["past_key_values.2.value"].shape == (1, 4, 0, HEAD_DIM)
    cost = graph_cost(decoder.path, {name: array.shape for name, array in row.items()})
    layers = decoder.view.layout.attention
    assert cost.by_scope["model.layers.1.self_attn.k_proj"] == 6 * WIDTH * HEAD_DIM
    scores = [2 * 2 * 36 * HEAD_DIM, 2 * 4 * 36 * HEAD_DIM, (2 + 4) * 36 * HEAD_DIM]
    assert [cost.by_scope[f"model.layers.{i}.self_attn"] for i in range(len(layers))] == scores


def test_half_precision_halves_the_cache_and_keeps_the_text(decoder: Exported, tmp_path: Path) -> None:
    convert_precision(decoder.path, tmp_path / "half.onnx", "fp16")
    with OrtDecoder(tmp_path / "half.onnx", threads=1) as graph, OrtDecoder(decoder.path, threads=1) as full:
        found = generate(graph, PROMPTS, new_tokens=5)
        assert [t.tokens[0] for t in found] == [t.tokens[0] for t in generate(full, PROMPTS, new_tokens=1)]
    half = onnx.load(str(tmp_path / "half.onnx")).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*half.input, *half.output]}
    assert kinds["past_key_values.0.key"] == kinds["present.0.key"] == onnx.TensorProto.FLOAT16
    convert_precision(decoder.path, tmp_path / "brain.onnx", "bf16")
    brain = onnx.load(str(tmp_path / "brain.onnx")).graph
    assert {v.type.tensor_type.elem_type for v in brain.output} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_angles_stay_in_fp32_from_positions_to_sines(decoder: Exported, precision: Any, tmp_path: Path) -> None:
    """fp16 has no odd numbers above 2048, and bf16 none above 256: neighbours would have one position."""
    convert_precision(decoder.path, tmp_path / "half.onnx", precision)
    angles = Angles.of(onnx.load(str(tmp_path / "half.onnx")))
    assert {node.op_type for node in angles.nodes} >= {"Cos", "Sin", "Cast", "Mul"}
    assert {tensor.data_type for tensor in angles.constants if tensor.dims} == {onnx.TensorProto.FLOAT}
    full = Angles.of(onnx.load(str(decoder.path)))
    assert len(angles.nodes) == len(full.nodes)


def test_channels_of_the_cache_can_be_scaled_as_the_past_comes_back_scaled(decoder: Exported, tmp_path: Path) -> None:
    model = onnx.load(str(decoder.path))
    heads = {
        f"present.{layer}.{tensor.name}": tensor.shape[0]
        for layer in (0, 1)
        for tensor in decoder.view.layout.attention[layer].cached
    }
    # Rotary positions mix the two halves of a head, so that both get the same scales.
    exponents = {name: np.tile(np.arange(HEAD_DIM // 2) % 3, 2 * count) for name, count in heads.items()}
    assert fold_channels(model, exponents) == set(heads)
    onnx.save(model, str(tmp_path / "scaled.onnx"))
    with OrtDecoder(tmp_path / "scaled.onnx", threads=1) as scaled, OrtDecoder(decoder.path, threads=1) as plain:
        assert generate(scaled, PROMPTS, new_tokens=20) == generate(plain, PROMPTS, new_tokens=20)
        ratio = np.abs(plain.cached()["present.0.key"]).sum() / np.abs(scaled.cached()["present.0.key"]).sum()
    assert 1.2 < ratio < 4


def test_profiles_take_prompts_with_no_past_and_single_tokens_with_any(decoder: Exported) -> None:
    spec = ExportSpec.model_validate({"sequence": {"min": 1, "opt": 8, "max": 16}, "context": 100})
    first = profiles_for(decoder.path, spec, {"sequence": 256})
    assert first["input_ids"] == {"min": (1, 1), "opt": (1, 8), "max": (8, 16)}
    assert first["attention_mask"] == {"min": (1, 1), "opt": (1, 8), "max": (8, 116)}
    assert first["past_key_values.1.key"]["min"] == first["past_key_values.1.key"]["opt"] == (1, 1, 0, HEAD_DIM)
    assert first["past_key_values.1.key"]["max"] == (8, 1, 100, HEAD_DIM)
    single = decode_profiles(decoder.path, first)
    assert {shape for shapes in (single["input_ids"], single["position_ids"]) for shape in shapes.values()} == {
        (1, 1),
        (8, 1),
    }
    assert single["attention_mask"] == {"min": (1, 1), "opt": (1, 51), "max": (8, 101)}
    assert single["past_key_values.2.value"]["opt"] == (1, 4, 50, HEAD_DIM)
    longest = profiles_for(decoder.path, ExportSpec(), {"sequence": 100_000})
    assert longest["input_ids"]["max"] == (8, 512)
    assert longest["past_key_values.1.key"]["max"] == (8, 1, 4096, HEAD_DIM)
    with pytest.raises(ExportError, match=r"export\.context is 100\n  expected: at most 64"):
        profiles_for(decoder.path, ExportSpec(context=100), {"sequence": 64})


@pytest.mark.skipif(not HAS_BUILDER, reason="tensorrt_rtx is not installed: no engine can be built")
def test_an_engine_has_fused_attention_for_prompts_and_for_single_tokens(decoder: Exported, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    convert_precision(decoder.path, half, "fp16")
    shapes = engine_shapes(half, ExportSpec(context=100), {"sequence": 256})
    info = build_engine(half, tmp_path / "e", resolve_target("sm86"), **shapes)
    assert info.listing is not None
    assert info.decode == shapes["decode"] != info.profiles
    # Of the three layers one gathers the weights of its representatives, which no fused kernel does.
    assert info.listing.fused_attention == 2 * 2


# ------------------------------------------------------------------------------------------- which models have a cache


def test_whether_a_cache_is_exported_is_the_recipes_choice_where_there_is_one() -> None:
    view, batch = ModelView.of(llama()), {"input_ids": np.ones((2, 4), np.int64)}
    assert caches(view, batch, "auto")
    assert caches(view, batch, True)
    assert not caches(view, batch, False)
    embeds = {"inputs_embeds": np.zeros((2, 4, WIDTH))}
    assert not caches(view, embeds, "auto")
    with pytest.raises(ExportError, match=r"export\.cache is true, but it is fed inputs_embeds beside tokens"):
        caches(view, embeds, True)


@pytest.mark.parametrize(
    ("family", "reason"), [("bert", "BertModel does not generate text"), ("torch", "TwoHeads does")]
)
def test_models_without_a_cache_say_why(family: str, reason: str) -> None:
    view = ModelView.of(make_model(family))
    assert reason in why_no_cache(view)
    with pytest.raises(ExportError, match=reason):
        caches(view, {"input_ids": np.ones((2, 4))}, True)


def test_encoder_decoders_and_clusters_of_every_sample_have_no_cache() -> None:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    t5 = transformers.T5ForConditionalGeneration(config)
    assert "without an encoder" in why_no_cache(ModelView.of(t5))
    classifier = transformers.LlamaForSequenceClassification(llama().config)
    assert "does not generate text" in why_no_cache(ModelView.of(classifier))
    view = ModelView.of(llama())
    surgery.apply(view, EditPlan(edits=(ClusterOnline(layer=1, count=2),)))
    assert why_no_cache(view).startswith("layers 1 form their clusters from the first tokens")
