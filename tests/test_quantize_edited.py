"""Quantization of graphs whose layers were edited before: pruned, shared, clustered, latent, with fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import LAYERS, make_inputs, make_model
from onnx import numpy_helper
from test_latent_kv import compress
from test_prune_tokens import STREAM
from test_share_kv import share

from headwise.calibration.formats import restore
from headwise.calibration.products import quantized_input
from headwise.calibration.ranges import Observed, collect_ranges
from headwise.calibration.tasks import Examples
from headwise.errors import ExportError
from headwise.export.decode import decode_for_onnxruntime
from headwise.export.kv import find_cached, fold_channels, quantize_cached
from headwise.export.matrices import TapRunner, find_matrices, find_taps, products
from headwise.export.onnx import to_onnx
from headwise.export.quantize import SCALE_DTYPES, correct_biases, write_quantized
from headwise.export.runners import OrtRunner
from headwise.export.smoothing import require_same, smooth
from headwise.model.attend import Form, form
from headwise.model.edits import ClusterHeads, DropHeads, DropNeurons, EditPlan
from headwise.model.quantization import Codes, QuantPlan
from headwise.model.surgery import apply
from headwise.model.token_edits import KeepTokens
from headwise.model.view import ModelView
from headwise.passes.kv import channel_exponents
from headwise.passes.quantize import Quantize
from headwise.pipeline.graphs import DECODED, GRAPH, judged

Array = Any
PRUNED = EditPlan(
    edits=(
        DropHeads(layer=0, query=(0, 1)),
        DropHeads(layer=2, query=(2, 3)),
        DropNeurons(layer=1, neurons=tuple(range(0, 48, 3))),
    )
)
CLUSTERED = EditPlan(edits=tuple(ClusterHeads(layer=i, clusters=((2, 0), (1, 3))) for i in range(LAYERS - 1)))


def prune(family: str) -> ModelView:
    view = ModelView.of(make_model(family))
    apply(view, PRUNED)
    return view


def share_kv(family: str) -> ModelView:
    view = ModelView.of(make_model(family))
    share(view, family, kv_heads=2)
    return view


def cluster(family: str) -> ModelView:
    view = ModelView.of(make_model(family))
    apply(view, CLUSTERED)
    return view


def latent(family: str) -> ModelView:
    return compress(family, rank=16)[0]


def fewer_tokens(family: str) -> ModelView:
    """Tokens leave behind the first layer."""
    view = ModelView.of(make_model(family))
    apply(view, EditPlan(edits=(KeepTokens(layer=0, budget=STREAM["fused"]),)))
    return view


CASES: dict[str, tuple[str, Callable[[str], ModelView], Form, int | None]] = {
    "pruned llama": ("llama", prune, "fused", 6),
    "shared bert": ("bert", share_kv, "fused", 6),
    # Queries and keys of clustered layers are repeated: their scales do not fold, those of the values do.
    "clustered bert, fused": ("bert", cluster, "fused", 4),
    "clustered bert, gathered": ("bert", cluster, "gathered", None),
    "latent bert": ("bert", latent, "fused", 6),
    # Keys of the first layer also say what tokens are worth.
    "bert with fewer tokens": ("bert", fewer_tokens, "fused", 4),
}
"""Family, edit, form of the graph, and the keys and values with a scale per channel; None where they cannot be told."""
Case = tuple[Path, dict[str, Array], int | None]


def ranges(path: Path, inputs: dict[str, Array], names: list[str], *, moments: bool = False) -> dict[str, Observed]:
    rows = [{name: array[index] for name, array in inputs.items()} for index in range(len(next(iter(inputs.values()))))]
    examples, taps = Examples.of(rows, source="made up"), find_taps(path, names)
    return collect_ranges(TapRunner(path, names), examples, taps, moments=names if moments else ())


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An fp32 graph of an edited model, inputs for it, and the number from the table."""
    family, edit, name, folds = CASES[request.param]
    path = tmp_path_factory.mktemp("edited") / "edited.onnx"
    view = edit(family)
    inputs = {key: tensor.numpy() for key, tensor in make_inputs(family).items()}
    dynamic = dict.fromkeys(inputs, (0, 1))
    with form(name):
        to_onnx(view.module, inputs, path, dynamic=dynamic)
    return path, inputs, folds


def outputs(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    with OrtRunner(path, ignore=inputs) as runner:
        return runner(inputs)


def distance(reference: dict[str, Array], found: dict[str, Array]) -> float:
    return max(float(np.linalg.norm(found[n] - reference[n]) / np.linalg.norm(reference[n])) for n in reference)


@pytest.mark.parametrize("number", ["int8", "int4"])
def test_every_matrix_that_is_left_is_quantized(case: Case, number: Any) -> None:
    path, inputs, _ = case
    options = Quantize(format=number, block=16, smooth=0.5)
    matrices = find_matrices(path)
    seen = ranges(path, inputs, [matrix.tap for matrix in matrices])
    scales = options.smoothing(matrices, seen, quantized_input)
    assert scales
    model = onnx.load(str(path))
    names = list(options.plan(matrices, seen).quantized())
    smooth(model, scales, names)
    smoothed = path.with_name("smoothed.onnx")
    onnx.save(model, str(smoothed))
    assert require_same(path, smoothed, inputs) < 1e-5
    matrices = find_matrices(smoothed)
    seen = ranges(smoothed, inputs, [matrix.tap for matrix in matrices])
    plan, dtype = options.plan(matrices, seen), SCALE_DTYPES["fp16"]
    codes = options.codes(plan, matrices, seen, quantized_input, dtype)
    out = path.with_name("quantized.onnx")
    written = write_quantized(smoothed, out, plan, codes, precision="fp16")
    odd = [entry.name for entry in plan.matrices if entry.format is None]
    assert len(written.promises) + len(odd) == len(matrices) >= 4 * LAYERS
    assert number == "int4" or not odd
    assert all("inputs are no multiple of 16" in entry.reason for entry in plan.matrices if entry.name in odd)
    error = distance(outputs(path, inputs), outputs(out, inputs))
    assert 1e-4 < error < {"int8": 0.1, "int4": 0.5}[number]
    assert any(codes[name].bias_delta is not None for name in codes) == any(matrix.biased for matrix in matrices)


FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"format": "fp8"},
    "nvfp4": {"format": "nvfp4"},
    "int8, weights only": {"weights_only": True},
    "fp8, weights only": {"format": "fp8", "weights_only": True},
    "int4": {"format": "int4", "block": 16},
    "int4, gptq": {"format": "int4", "block": 16, "rounding": "gptq"},
    "nvfp4, weights only": {"format": "nvfp4", "weights_only": True},
    "mxfp8": {"format": "mxfp8"},
}


def fake_quantized(path: Path, plan: QuantPlan, codes: dict[str, Codes]) -> Path:
    """The fp32 graph with the numbers that codes of weights stand for."""
    model = onnx.load(str(path))
    correct_biases(model, codes)
    planned = plan.quantized()
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for product in products(model.graph):
        if product.name in planned:
            value = restore(codes[product.name], planned[product.name].block, SCALE_DTYPES["fp32"])
            value = np.ascontiguousarray(value.T if product.transposed else value)
            constants[product.weight].CopyFrom(numpy_helper.from_array(value, product.weight))
    onnx.save(model, str(path.with_name("fake.onnx")))
    return path.with_name("fake.onnx")


def test_every_format_is_what_the_plan_says(case: Case) -> None:
    """Weights alone give what a graph with rounded weights gives; with activations, more error but not much more."""
    path, inputs, _ = case
    matrices, dtype = find_matrices(path), SCALE_DTYPES["fp32"]
    seen = ranges(path, inputs, [matrix.tap for matrix in matrices], moments=True)
    exact = outputs(path, inputs)
    for name, options in FORMATS.items():
        chosen = Quantize(smooth=None, **options)
        plan = chosen.plan(matrices, seen)
        codes = chosen.codes(plan, matrices, seen, quantized_input, dtype)
        written = write_quantized(path, path.with_name(GRAPH), plan, codes, precision="fp32")
        left = [entry.reason for entry in plan.matrices if entry.format is None]
        assert {promise.matrix for promise in written.promises} == set(plan.quantized()), name
        assert len(written.promises) + len(left) == len(matrices), name
        assert all("inputs are no multiple of" in reason for reason in left), name
        path.with_name(DECODED[GRAPH]).unlink(missing_ok=True)
        decode_for_onnxruntime(path.with_name(GRAPH), path.with_name(DECODED[GRAPH]))
        found = outputs(judged(path.with_name(GRAPH)), inputs)
        twin = outputs(fake_quantized(path, plan, codes), inputs)
        error, rounding = distance(exact, found), distance(twin, found)
        assert 1e-4 < error < 0.6, name
        weights_only = all(entry.input_largest is None for entry in plan.matrices)
        assert (rounding < 1e-5) == weights_only, name
        assert rounding <= error or not weights_only, name


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_every_range_is_found_in_what_is_left(case: Case, method: Any) -> None:
    path, inputs, _ = case
    matrices = find_matrices(path)
    seen = ranges(path, inputs, [matrix.tap for matrix in matrices])
    whole, part = (Quantize(calibration=m, percentile=99, smooth=None).plan(matrices, seen) for m in ("minmax", method))
    shares = [part.quantized()[name].input_largest / entry.input_largest for name, entry in whole.quantized().items()]
    assert 0.05 < min(shares) < 1
    assert max(shares) <= 1


def test_keys_and_values_that_are_left_are_quantized(case: Case) -> None:
    path, inputs, folds = case
    model = onnx.load(str(path))
    if folds is None:
        with pytest.raises(
            ExportError, match=r"the keys and values of encoder\.layer\.0\.attention\.self cannot be told"
        ):
            find_cached(model, [f"encoder.layer.{index}.attention.self" for index in range(LAYERS)])
        return
    cached = find_cached(model)
    assert len(cached) == 2 * LAYERS
    names = [entry.name for entry in cached]
    values = TapRunner(path, names)(inputs)
    exponents = {
        entry.name: channel_exponents(
            np.abs(values[entry.name]).max(axis=(0, 2)).ravel(), width=entry.width, pairs=entry.pairs
        )
        for entry in cached
    }
    folded = fold_channels(model, exponents)
    assert len(folded) == folds
    out = path.with_name("folded.onnx")
    onnx.save(model, str(out))
    assert require_same(path, out, inputs) < 1e-4
    largest = {name: float(np.abs(array).max()) for name, array in TapRunner(out, names)(inputs).items()}
    scales = {name: value / 127 for name, value in largest.items()}
    quantize_cached(model, scales, dict.fromkeys(scales, "int8"))
    onnx.save(model, str(out))
    assert 1e-5 < distance(outputs(path, inputs), outputs(out, inputs)) < 0.05
