"""Shared kv heads behind the pass: the report, the text that a graph writes, the kernels of an engine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCABULARY, make_inputs, make_model
from runs import TEXT, run, text_files, write_recipe
from test_passes import samples

from headwise.calibration.data import DataSpec, load_table
from headwise.calibration.tasks import Examples, Task, make_task
from headwise.calibration.tasks.language import LanguageOptions
from headwise.export.onnx import to_onnx
from headwise.export.precision import ExportSpec, convert_precision
from headwise.export.runners import OrtRunner
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine, profiles_for
from headwise.model.checkpoint import load_checkpoint
from headwise.model.view import ModelView
from headwise.passes.base import run_pass
from headwise.passes.share_kv import ShareKVHeads
from headwise.pipeline.commands.planning import plan_passes
from headwise.pipeline.report.document import markdown

MODELS = os.environ.get("HEADWISE_MODELS", "")
"""Folder of real checkpoints by name, for the tests that need one."""
needs_stories = pytest.mark.skipif(
    not (Path(MODELS) / "stories260k").is_dir(), reason="HEADWISE_MODELS names no folder with the model stories260k"
)
needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: no engine can be built"
)


def test_pruned_layers_are_shared_and_converted_with_a_gate_after_every_stage(tmp_path: Path) -> None:
    folder = text_files(tmp_path / "run")
    passes = [{"prune-heads": {"ratio": 0.25}}, {"share-kv": {"kv_heads": 2, "rounds": 1}}]
    recipe = write_recipe(
        folder, {**TEXT, "passes": passes, "gate": {"max_drop": 100.0}, "export": {"precision": "fp16"}}
    )
    found = run(folder)
    assert found.exit_code == 0, found.reason
    stages = {stage["name"]: stage for stage in found.report["stages"]}
    assert list(stages) == ["baseline", "prune-heads", "share-kv", "onnx", "fp16"]
    for name in ("prune-heads", "share-kv", "onnx", "fp16"):
        assert [verdict["outcome"] for verdict in stages[name]["verdicts"]] == ["PASS"], name
    layers = stages["share-kv"]["record"]["after"]["attention"]
    assert [(len(layer["query"]), len(layer["kv"])) for layer in layers] == [(3, 1), (3, 1)]
    assert stages["share-kv"]["cost"]["macs"] < stages["prune-heads"]["cost"]["macs"]
    assert all(fit["after"] <= fit["before"] for fit in stages["share-kv"]["record"]["refit"])
    assert "3 kv heads become 1" in markdown(found.report)
    assert "1 because 2 does not divide 3" in markdown(found.report)
    plans = plan_passes(str(folder / "checkpoint"), str(recipe))
    assert plans[1]["plan"]["notes"] == stages["share-kv"]["record"]["plan"]["notes"]


def share_and_export(module: torch.nn.Module, task: Task, examples: Examples, kv_heads: int, path: Path) -> None:
    view = ModelView.of(module)
    run_pass(ShareKVHeads(kv_heads=kv_heads), view, view, task, examples)
    assert {len(layer.kv) for layer in view.layout.attention} == {kv_heads}
    to_onnx(module, examples.example_batch(), path, dynamic=examples.dynamic_axes())


def greedy_torch(module: Any, prompt: list[int], length: int) -> list[int]:
    with torch.no_grad():
        found = module.generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return [int(token) for token in found[0]]


def greedy_graph(path: Path, prompt: list[int], length: int) -> list[int]:
    """The graph has no cache: every token is found by running the whole text again."""
    tokens = list(prompt)
    with OrtRunner(path) as runner:
        for _ in range(length):
            ids = np.array([tokens], np.int64)
            logits = runner({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_the_graph_writes_what_torch_writes(tmp_path: Path) -> None:
    module = make_model("llama")
    task, examples = samples(ModelView.of(module), "llama")
    share_and_export(module, task, examples, 1, tmp_path / "model.onnx")
    prompt = make_inputs("llama")["input_ids"][0, :3].tolist()
    written = greedy_torch(module, prompt, 20)
    assert greedy_graph(tmp_path / "model.onnx", prompt, 20) == written
    assert len(written) == 23
    assert len(set(written)) > 3, "a text of one token would be easy to repeat"
    assert max(written) < VOCABULARY


@needs_stories
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_graph_of_a_real_model_writes_what_torch_writes(kv_heads: int, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(Path(MODELS) / "stories260k")
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(STORIES))
    data = DataSpec(path=str(tmp_path / "text.txt"), format="text", separator="<|endoftext|>")
    task = make_task(LanguageOptions(type="language-modeling", data=data))
    examples = task.encode(load_table(data, task.roles()), checkpoint)
    share_and_export(checkpoint.module, task, examples, kv_heads, tmp_path / "model.onnx")
    prompt = checkpoint.tokenizer()("Once upon a time")["input_ids"]
    written = greedy_torch(checkpoint.module, prompt, 60)
    assert greedy_graph(tmp_path / "model.onnx", prompt, 60) == written


STORIES = [
    f"Once upon a time, there was a {size} {animal}. The {animal} liked to {verb} in the {place}. One day, it saw a "
    f'{size} {thing}. "Can I {verb} with you?" said the {animal}. The {thing} was happy and they {verb} all day.'
    for size in ("little", "big")
    for animal, thing in (("dog", "ball"), ("cat", "tree"), ("bird", "girl"), ("fish", "boat"))
    for verb, place in (("play", "park"), ("run", "garden"), ("sing", "house"))
]


@needs_builder
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_engine_still_has_one_fused_attention_kernel_per_layer(kv_heads: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
    )
    module = transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    task, examples = samples(ModelView.of(module), "bert")
    view = ModelView.of(module)
    run_pass(ShareKVHeads(kv_heads=kv_heads, refit=False), view, view, task, examples)
    to_onnx(module, examples.example_batch(), tmp_path / "model.onnx", dynamic=examples.dynamic_axes())
    spec = ExportSpec(precision="fp16")
    convert_precision(tmp_path / "model.onnx", tmp_path / "half.onnx", "fp16", keep_io=spec.keep_io)
    profiles = profiles_for(tmp_path / "half.onnx", spec, {"sequence": 40})
    info = build_engine(tmp_path / "half.onnx", tmp_path / "e.engine", resolve_target("sm86"), profiles=profiles)
    assert info.listing is not None
    assert info.listing.fused_attention == config.num_hidden_layers
