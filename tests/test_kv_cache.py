"""Caches of codes: a graph takes and returns int8 or fp8, and writes what torch writes with the same scales."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from conftest import make_inputs, randomize
from onnx import TensorProto
from pydantic import ValidationError
from test_decoder import PROMPTS, llama
from test_latent_kv import compress

from headwise.calibration.formats import input_scale
from headwise.errors import ExportError, PlanError
from headwise.export.decode import decode_for_onnxruntime
from headwise.export.decoder import decoder_to_onnx
from headwise.export.generate import Continuation, generate
from headwise.export.kv import find_cached, fold_channels, quantize_cached
from headwise.export.kv_cache import code_caches
from headwise.export.matrices import TapRunner
from headwise.export.ports import cache_bytes
from headwise.export.precision import ExportSpec, convert_precision, to_precision
from headwise.export.profiles import engine_shapes
from headwise.export.runners import OrtRunner
from headwise.export.smoothing import require_same
from headwise.export.stepping import Decoder, OrtDecoder, TorchDecoder
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.model import surgery
from headwise.model.checkpoint import load_checkpoint
from headwise.model.edits import ClusterHeads, DropHeads, EditPlan, ShareKV
from headwise.model.view import ModelView
from headwise.passes.kv import channel_exponents
from headwise.passes.quantize import Quantize

Array = Any
HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None
MODELS = os.environ.get("HEADWISE_MODELS", "")
NEW = 12


class Case(NamedTuple):
    """A decoder, its fp32 graph with scaled channels, and the scale of every channel of what it caches."""

    view: ModelView
    path: Path
    scales: dict[str, Array]
    per_channel: int


def edited_llama() -> ModelView:
    """Layer 0 has lost two heads, layer 1 shares one kv head, layer 2 has two keys and four values."""
    view = ModelView.of(llama())
    edits = (
        DropHeads(layer=0, query=(1, 2)),
        ShareKV(layer=1, groups=((0, 1, 2, 3),)),
        ClusterHeads(layer=2, clusters=((2, 0), (1, 3))),
    )
    surgery.reshape(view, EditPlan(edits=edits).predict(view.layout))
    randomize(view.module)
    return view


CASES = {
    # Keys and values of clustered layers are read by other heads than they belong to.
    "heads": (edited_llama, 4),
    # The rotary keys beside a latent have one scale.
    "latents": (lambda: compress("llama", rank=(8, 5, 6), rotary=4)[0], 3),
    "latents alone": (lambda: compress("gpt2", rank=(8, 5, 6))[0], 3),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    build, per_channel = CASES[request.param]
    found = exported(build(), tmp_path_factory.mktemp("cache"))
    assert found.per_channel == per_channel
    return found


def exported(view: ModelView, folder: Path) -> Case:
    decoder_to_onnx(view, make_inputs("llama")["input_ids"].numpy(), folder / "plain.onnx")
    return scaled(view, folder)


def scaled(view: ModelView, folder: Path) -> Case:
    """``folder`` holds the graph."""
    ids = make_inputs("llama")["input_ids"].numpy()
    model = onnx.load(str(folder / "plain.onnx"))
    cached = find_cached(model, [layer.path for layer in view.attention])
    assert [entry.name for entry in cached] == list(view.layout.cache.present())
    assert cached[0].label == f"{view.attention[0].path}.{view.layout.attention[0].cached[0].name}"
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    seen = TapRunner(folder / "plain.onnx", [entry.tap for entry in cached])(batch)
    largest = {entry.name: np.abs(seen[entry.tap]).max(axis=(0, 2)).ravel() for entry in cached}
    exponents = {
        entry.name: channel_exponents(largest[entry.name], width=entry.width, pairs=entry.pairs) for entry in cached
    }
    folded = fold_channels(model, exponents)
    onnx.save(model, str(folder / "folded.onnx"))
    assert require_same(folder / "plain.onnx", folder / "folded.onnx", batch) < 1e-5
    scales = {}
    for entry in cached:
        shift = exponents[entry.name] if entry.name in folded else np.zeros_like(exponents[entry.name])
        scale = float((largest[entry.name] * np.exp2(-shift)).max())
        scales[entry.name] = (scale * np.exp2(shift)).reshape(1, entry.heads, 1, entry.width)
    return Case(view, folder / "folded.onnx", scales, len(folded))


def coded(case: Case, number: Any, folder: Path) -> tuple[Path, dict[str, Array]]:
    """The graph with a cache of codes, and for every cached tensor the numbers that one step of a code stands for."""
    model = onnx.load(str(case.path))
    largest = {name: float(np.abs(array).max()) for name, array in per_tensor(case).items()}
    steps = {name: input_scale(value, number, np.dtype(np.float16)) for name, value in largest.items()}
    quantize_cached(model, steps, dict.fromkeys(steps, number))
    onnx.checker.check_model(model, full_check=True)
    code_caches(model.graph, "fp8")
    onnx.save(model, str(folder / "coded.onnx"))
    shifts = {name: scale / largest[name] for name, scale in case.scales.items()}
    return folder / "coded.onnx", {name: steps[name] * shifts[name] for name in steps}


def per_tensor(case: Case) -> dict[str, Array]:
    """What the scaled graph caches of the calibration tokens, before it drops any."""
    ids = make_inputs("llama")["input_ids"].numpy()
    taps = {entry.name: entry.tap for entry in find_cached(onnx.load(str(case.path)))}
    found = TapRunner(case.path, list(taps.values()))({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return {name: found[tap] for name, tap in taps.items()}


class Rounding:
    """The cache of a layer in torch that rounds new tokens to codes, and keeps the numbers that these stand for."""

    def __init__(self, layer: Any, steps: list[Array], number: str) -> None:
        self.put, self.number = layer.update, number
        # Blocks of heads lie side by side in what a layer is given.
        self.steps = [torch.tensor(np.concatenate(steps[i::2], axis=1)).float() for i in range(min(2, len(steps)))]
        layer.update = self.update

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        rounded = [self.round(*pair) for pair in zip((key_states, value_states), self.steps, strict=False)]
        return self.put(rounded[0], rounded[1] if len(rounded) == 2 else value_states, *args, **kwargs)

    def round(self, states: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        if self.number == "int8":
            return torch.clamp(torch.round(states / step), -128, 127) * step
        codes = np.clip((states / step).numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return torch.tensor(codes.astype(np.float32)) * step


class RoundingDecoder(TorchDecoder):
    """The untouched weights in torch, with a cache that rounds."""

    def __init__(self, case: Case, steps: dict[str, Array], number: str) -> None:
        self.layers: list[list[Array]] = [[] for _ in case.view.attention]
        for name, step in steps.items():
            self.layers[int(name.split(".")[1])].append(step)
        self.number = number
        super().__init__(case.view)

    def begin(self, rows: int) -> None:
        super().begin(rows)
        for layer, steps in zip(self.cache.layers, self.layers, strict=True):
            Rounding(layer, steps, self.number)


def texts(decoder: Decoder, batch: int = 4) -> list[Continuation]:
    return generate(decoder, PROMPTS, new_tokens=NEW, batch=batch)


@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_text_with_a_cache_of_codes_is_that_of_torch(case: Case, number: str, tmp_path: Path) -> None:
    path, steps = coded(case, number, tmp_path)
    kind = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[number]
    graph = onnx.load(str(path)).graph
    held = [v for v in [*graph.input, *graph.output] if v.name.startswith(("past_key_values.", "present."))]
    assert {value.type.tensor_type.elem_type for value in held} == {kind}
    assert [node.op_type for node in graph.node].count("QuantizeLinear") == len(steps)
    assert cache_bytes(path) * 4 == cache_bytes(case.path) == 4 * case.view.layout.cache.numbers
    assert decode_for_onnxruntime(path, tmp_path / "decoded.onnx") == (number == "fp8")
    decoder = OrtDecoder(path if number == "int8" else tmp_path / "decoded.onnx")
    expected = texts(RoundingDecoder(case, steps, number))
    assert texts(decoder) == expected
    assert texts(decoder, batch=1) == expected
    assert [len(text.tokens) for text in expected] == [NEW] * len(PROMPTS)
    assert expected != texts(TorchDecoder(case.view)), "rounding that changes nothing would not be seen to be missing"


@pytest.mark.skipif(
    not (Path(MODELS) / "stories260k").is_dir(), reason="HEADWISE_MODELS names no folder with the model stories260k"
)
@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_a_trained_model_tells_the_stories_that_torch_tells(number: str, tmp_path: Path) -> None:
    case = exported(load_checkpoint(str(Path(MODELS) / "stories260k")).view(), tmp_path)
    path, steps = coded(case, number, tmp_path)
    decoded = decode_for_onnxruntime(path, tmp_path / "decoded.onnx")
    decoder = OrtDecoder(tmp_path / "decoded.onnx" if decoded else path)
    prompts = [[1, 403, 407, 261, 378], [1, 367, 269], [1, 291], [1, 317, 263, 266, 399, 327]]
    expected = generate(RoundingDecoder(case, steps, number), prompts, new_tokens=200)
    assert generate(decoder, prompts, new_tokens=200) == expected
    assert case.per_channel == 10


def test_what_is_cached_are_the_codes_of_the_numbers(case: Case, tmp_path: Path) -> None:
    path, steps = coded(case, "int8", tmp_path)
    ids = np.array([[5, 9, 7, 3]])
    plain, decoder = OrtDecoder(case.path.with_name("plain.onnx")), OrtDecoder(path)
    for each in (plain, decoder):
        each(ids, np.ones_like(ids), np.arange(4)[None])
    first = next(iter(steps))  # behind it, layers read rounded numbers
    codes, numbers = decoder.cached()[first], plain.cached()[first]
    assert codes.dtype == np.int8
    assert np.abs(codes - np.clip(np.rint(numbers / steps[first]), -128, 127)).max() <= 1
    assert np.abs(codes).max() > 64


def test_half_precision_leaves_the_codes(case: Case, tmp_path: Path) -> None:
    path, _ = coded(case, "int8", tmp_path)
    convert_precision(path, tmp_path / "half.onnx", "fp16")
    assert cache_bytes(tmp_path / "half.onnx") == cache_bytes(path)
    batch = {"input_ids": make_inputs("llama")["input_ids"].numpy()}
    with OrtRunner(path) as full, OrtRunner(tmp_path / "half.onnx") as half:
        np.testing.assert_allclose(half(batch)["logits"], full(batch)["logits"], atol=0.1)


@pytest.mark.skipif(not HAS_BUILDER, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("case", ["heads"], indirect=True)
@pytest.mark.parametrize(("number", "target"), [("int8", "sm75"), ("fp8", "sm89")])
def test_engines_take_a_cache_of_codes(case: Case, number: Any, target: str, tmp_path: Path) -> None:
    model = onnx.load(str(case.path))
    quantize_cached(model, dict.fromkeys(case.scales, 0.125), dict.fromkeys(case.scales, number))
    model = to_precision(model, "fp16")
    code_caches(model.graph, "fp8")
    onnx.save(model, str(tmp_path / "half.onnx"))
    shapes: Any = engine_shapes(tmp_path / "half.onnx", ExportSpec(), {"sequence": 64})
    built = build_engine(tmp_path / "half.onnx", tmp_path / "model.engine", resolve_target(target), **shapes)
    assert built.listing is not None
    # For prompts, and for single tokens; the clustered layer is no single kernel in a decoder.
    assert built.listing.fused_attention == 2 * 2


def test_a_cache_that_is_filled_in_another_way_is_refused(case: Case) -> None:
    model = onnx.load(str(case.path))
    name = next(iter(case.scales))
    join = next(node for node in model.graph.node if name in node.output)
    join.op_type, join.input[:] = "Identity", [join.input[0]]
    with pytest.raises(
        ExportError, match=r"present\.0\.\w+ does not come from a Concat of the past and the new tokens"
    ):
        find_cached(model)


def test_a_recipe_chooses_the_format_of_every_cached_tensor() -> None:
    labels = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(3) for kind in ("key", "value")]
    assert Quantize(kv="int8").kv_formats(labels) == dict.fromkeys(labels, "int8")
    assert Quantize().kv_formats(labels) == {}
    mixed = Quantize(kv={"model.layers.0.*": "float", "*.value": "int8"})
    assert mixed.kv_formats(labels) == {labels[3]: "int8", labels[5]: "int8"}
    assert mixed.schemes() == {"int8", "int8-kv"}
    assert Quantize(kv={"*.key": "fp8", "*": "int8"}).schemes() == {"int8", "fp8-kv", "int8-kv"}
    with pytest.raises(PlanError, match=r'quantize\.kv: no cached tensor is called "\*\.keys"'):
        Quantize(kv={"*.keys": "int8"}).kv_formats(labels)
    with pytest.raises(ValidationError):
        Quantize(kv={"*": "int4"})  # type: ignore[dict-item]
