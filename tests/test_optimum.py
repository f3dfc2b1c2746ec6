"""Exported folders in Optimum, which needs an older transformers, so a Python of its own: HEADWISE_OPTIMUM_PYTHON."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from conftest import make_inputs, randomize
from runs import begun, run

from headwise.export.generate import generate
from headwise.export.onnx import to_onnx
from headwise.export.runners import OrtRunner
from headwise.export.stepping import OrtDecoder
from headwise.model import surgery
from headwise.model.checkpoint import Checkpoint
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.saving import save_checkpoint
from headwise.pipeline.companions import write_companions

PYTHON = os.environ.get("HEADWISE_OPTIMUM_PYTHON", "")
READER = Path(__file__).with_name("optimum_reads.py")
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_labels": 6,
}
pytestmark = pytest.mark.skipif(not PYTHON, reason="HEADWISE_OPTIMUM_PYTHON names no Python that has optimum-onnx")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def read(graph: Path, kind: str, inputs: dict[str, np.ndarray], tmp_path: Path) -> dict[str, np.ndarray]:
    """What a class of Optimum makes of the folder."""
    np.savez(tmp_path / "inputs.npz", **inputs)
    arguments = [str(graph), kind, str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz")]
    done = subprocess.run([PYTHON, str(READER), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(np.load(tmp_path / "outputs.npz"))


def same(graph: Path, kind: str, inputs: dict[str, np.ndarray], tmp_path: Path) -> set[str]:
    """The outputs that Optimum gives, after they were found to be those of the graph."""
    found = read(graph, kind, inputs, tmp_path)
    with OrtRunner(graph / "model.onnx") as runner:
        expected = runner(inputs)
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6)
    return set(found)


@pytest.mark.parametrize("stage", ["02-onnx", "03-cpu"])
def test_an_encoder_gives_its_features(stage: str, base: Path, tmp_path: Path) -> None:
    folder = begun("text", base, tmp_path)
    done = run(folder, "passes=[{prune-heads: {ratio: 0.25}}, {quantize: {format: int8}}]", "targets=[cpu]")
    assert done.exit_code == 0, done.report["reason"]
    ids = np.array([[1, 5, 6, 7, 2, 0], [1, 8, 9, 10, 11, 2]])
    inputs = {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": (ids > 0).astype(np.int64)}
    assert same(folder / "out" / stage, "ORTModelForFeatureExtraction", inputs, tmp_path) == {"last_hidden_state"}


@pytest.mark.parametrize(
    ("kind", "family"), [("ORTModelForSequenceClassification", "bert"), ("ORTModelForImageClassification", "vit")]
)
def test_a_classifier_with_unequal_layers_gives_its_logits(kind: str, family: str, tmp_path: Path) -> None:
    module: Any
    if family == "bert":
        module = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, vocab_size=128))
    else:
        module = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, image_size=8, patch_size=4))
    made = Checkpoint(module=randomize(module).eval(), source="x", kind="transformers", digest="")
    view = made.view()
    surgery.apply(view, EditPlan(edits=(DropHeads(layer=0, query=(1,)), DropHeads(layer=1, query=(0, 2)))))
    save_checkpoint(made, view, tmp_path / "model")
    (tmp_path / "graph").mkdir()
    write_companions(made, tmp_path / "model", tmp_path / "graph")
    inputs = {name: tensor.numpy() for name, tensor in make_inputs(family).items()}
    dynamic = {name: (0, 1) if array.ndim == 2 else (0,) for name, array in inputs.items()}
    to_onnx(view.module, inputs, tmp_path / "graph" / "model.onnx", dynamic=dynamic)
    assert same(tmp_path / "graph", kind, inputs, tmp_path) == {"logits"}


def test_a_decoder_with_fewer_kv_heads_writes_what_the_graph_writes(base: Path, tmp_path: Path) -> None:
    folder = begun("story", base, tmp_path)
    done = run(folder, "passes=[{share-kv: {kv_heads: 2}}]", "gate={max_drop: 5}", "targets=[]")
    assert done.exit_code == 0, done.report["reason"]
    graph = folder / "out" / "02-onnx"
    prompt = np.array([[1, 5, 6, 7]])
    inputs = {"input_ids": prompt, "attention_mask": np.ones_like(prompt)}
    found = read(graph, "ORTModelForCausalLM", inputs, tmp_path)["sequences"][0, prompt.shape[1] :]
    expected = generate(OrtDecoder(graph / "model.onnx"), prompt.tolist(), new_tokens=12)
    assert found.tolist() == expected[0].tokens
