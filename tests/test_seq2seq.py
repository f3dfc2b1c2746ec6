"""Models with an encoder and a decoder: three kinds of attention layers, two sequences, two padding masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    SEQ2SEQ,
    VOCABULARY,
    bart_config,
    largest_difference,
    make_inputs,
    make_model,
    randomize,
    t5_config,
    whisper_config,
)
from test_stats import single_rows

from headwise.calibration.data import DataSpec, load_table
from headwise.calibration.refit import fit_output
from headwise.calibration.stats import Stat, collect
from headwise.calibration.tasks import Examples, Task, make_task
from headwise.calibration.tasks.fidelity import FidelityOptions
from headwise.errors import DataError
from headwise.export.onnx import to_onnx
from headwise.model import surgery
from headwise.model.access import attribute, watched_input
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import run
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes.base import run_pass
from headwise.passes.prune_heads import PruneHeads
from headwise.pipeline.commands.inspection import inspect_checkpoint

FAMILIES = sorted(SEQ2SEQ)
BEHIND_CROSS = {"bart": "encoder_attn_layer_norm", "whisper": "final_layer_norm", "t5": "layer.2"}
"""The module behind the attention of decoders to encoders, whose input is residual stream plus layer output."""


def fidelity() -> Task:
    return make_task(FidelityOptions.model_validate({"type": "fidelity", "data": {"path": "unused.npz"}}))


def ragged(family: str, rows: int = 6) -> Examples:
    """Rows whose sequences have other lengths in encoder and decoder, so that a batch has padding in both.

    Spectrograms are all of one length, and have as many tokens as the longest sequence of the decoder.
    """
    generator = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for row in range(rows):
        lengths = {"input_ids": 5 + row % 3, "decoder_input_ids": 7 - row % 3}
        ids = {name: generator.integers(3, VOCABULARY, n) for name, n in lengths.items()}
        masks = {name.replace("input_ids", "attention_mask"): np.ones(n, dtype=np.int64) for name, n in lengths.items()}
        sound = {"input_features": generator.normal(size=(8, 14)).astype(np.float32)}
        every = {**ids, **masks, **sound}
        found.append({name: every[name] for name in make_inputs(family)})
    return Examples.of(found, source="made up", padding=dict.fromkeys(found[0], 0))


def two_layers(family: str) -> ModelView:
    depth = {"encoder_layers": 2, "decoder_layers": 2}
    models = {
        "bart": lambda: transformers.BartModel(bart_config(**depth)),
        "whisper": lambda: transformers.WhisperModel(whisper_config(**depth)),
        "t5": lambda: transformers.T5Model(t5_config(num_layers=2)),
    }
    return ModelView.of(randomize(models[family]()))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_come_in_the_order_in_which_they_run(family: str) -> None:
    view, ran = two_layers(family), []
    handles = [
        layer.output.register_forward_hook(lambda *_, index=layer.index: ran.append(index)) for layer in view.attention
    ]
    with torch.no_grad():
        run(view.module, make_inputs(family))
    assert ran == list(range(6))
    assert [layer.family.causal for layer in view.attention] == [False, False, True, False, True, False]
    assert [layer.family.cross for layer in view.attention] == [False, False, False, True, False, True]
    assert len(handles) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_projects_keys_from_the_encoder_and_queries_from_itself(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), make_inputs(family)
    cross = next(layer for layer in view.attention if layer.family.cross)
    keys, queries = [], []
    with cross.watch_input(keys.append), cross.watch_query_input(queries.append), torch.no_grad():
        encoded = run(view.module, inputs)["encoder_last_hidden_state"]
    assert torch.equal(keys[0], encoded)
    assert not torch.equal(queries[0], encoded)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_what_the_output_is_added_to(family: str) -> None:
    view, seen = ModelView.of(make_model(family)), {}
    cross = next(layer for layer in view.attention if layer.family.cross)
    assert cross.residual
    behind = attribute(view.attention[1].block, BEHIND_CROSS[family])
    with (
        cross.watch_residual(lambda t: seen.__setitem__("residual", t)),
        cross.watch_output(lambda t: seen.__setitem__("output", t)),
        watched_input(behind, lambda t: seen.__setitem__("sum", t)),
        torch.no_grad(),
    ):
        run(view.module, make_inputs(family))
    assert torch.allclose(seen["residual"] + seen["output"], seen["sum"], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_leaves_out_the_padding_of_its_own_sequences(family: str) -> None:
    view, examples = ModelView.of(make_model(family)), ragged(family)
    needs = {Stat.HEAD_MEAN, Stat.INPUT_MOMENT, Stat.QUERY_MOMENT}
    padded = collect(view, fidelity(), examples, needs, batch_size=6)
    for layer in view.attention:
        heads, keys, queries = [], [], []
        with (
            layer.watch_heads(heads.append),
            layer.watch_input(keys.append),
            layer.watch_query_input(queries.append),
            torch.no_grad(),
        ):
            for row in single_rows(examples):
                run(view.module, row)
        assert torch.allclose(padded[Stat.HEAD_MEAN][layer.index], mean(heads), atol=1e-5)
        for stat, inputs in ((Stat.INPUT_MOMENT, keys), (Stat.QUERY_MOMENT, queries)):
            tokens = torch.cat(inputs, 1)[0].double()
            assert torch.allclose(padded[stat][layer.index][:-1, :-1], tokens.T @ tokens / len(tokens), atol=1e-4)


def mean(heads: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(heads, 1)[0].double().mean(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refit_leaves_out_the_padding_of_its_own_sequence(family: str) -> None:
    student, teacher = (ModelView.of(make_model(family)) for _ in range(2))
    surgery.apply(student, EditPlan(edits=tuple(DropHeads(layer=layer, query=(0, 3)) for layer in range(3))))
    examples = ragged(family, rows=18)
    for layer in student.attention:
        batched, single = (fit_output(student, teacher, layer.index, examples, batch_size=size) for size in (8, 1))
        assert torch.allclose(batched.weight, single.weight, atol=1e-4)
        assert batched.before == pytest.approx(single.before, rel=1e-3)
        assert batched.after < batched.before


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_pooled_over_the_tokens_that_they_are_about(family: str) -> None:
    module, examples, task = make_model(family), ragged(family), fidelity()
    facts = {"pooling": "mean"}
    (batch,) = Examples.of(examples.rows, source="x", padding=examples.padding, facts=facts).batches(6)
    with torch.no_grad():
        outputs = run(module, {name: torch.as_tensor(array) for name, array in batch.inputs.items()})
        together = task.read({name: tensor.numpy() for name, tensor in outputs.items()}, batch)
        assert set(together) == {"last_hidden_state", "encoder_last_hidden_state"}
        for position, sample in enumerate(batch.samples):
            row = {name: torch.as_tensor(array[None]) for name, array in examples.rows[sample].items()}
            for name, tensor in run(module, row).items():
                assert np.allclose(together[name][position], tensor[0].mean(0).numpy(), atol=1e-5)


def sentences(rows: int, *, full: bool = False) -> dict[str, np.ndarray]:
    """Arrays for a classifier that reads the state of the last token, whose id is 2."""
    generator = np.random.default_rng(0)
    ids, mask = generator.integers(3, VOCABULARY, (rows, 8)), np.ones((rows, 8), dtype=np.int64)
    for row in range(rows):
        length = 8 if full else 8 - row % 4
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 2, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("full", [False, True])
def test_a_classifier_that_reads_the_last_token_goes_through_the_fidelity_task(full: bool, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **sentences(30, full=full))
    view, teacher = (ModelView.of(classifier()) for _ in range(2))
    spec = DataSpec.model_validate({"path": str(tmp_path / "data.npz")})
    task = fidelity()
    checkpoint = Checkpoint(module=view.module, source="x", kind="transformers", digest="")
    examples = task.encode(load_table(spec, ()), checkpoint)
    sample = examples.example_batch()
    # Some of the sample is padding, and every row still ends.
    assert 0 < sample["attention_mask"].sum() < sample["attention_mask"].size
    assert (sample["input_ids"] == 2).sum(axis=1).tolist() == [1, 1]
    record = run_pass(PruneHeads(ratio=0.4), view, teacher, task, examples)
    assert record.twin_error < 1e-4
    assert all(fit["after"] <= fit["before"] for fit in record.refit)


def classifier() -> torch.nn.Module:
    return randomize(transformers.BartForSequenceClassification(bart_config(num_labels=3)))


def test_a_classifier_of_sounds_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", input_features=generator.normal(size=(8, 8, 14)).astype(np.float32))
    config = whisper_config(num_labels=3, classifier_proj_size=16, encoder_layers=2)
    module, original = (randomize(transformers.WhisperForAudioClassification(config)) for _ in range(2))
    checkpoint = Checkpoint(module=module, source="x", kind="transformers", digest="")
    task, view = fidelity(), checkpoint.view()
    examples = task.encode(load_table(DataSpec.model_validate({"path": str(tmp_path / "data.npz")}), ()), checkpoint)
    run_pass(PruneHeads(ratio=0.4), view, ModelView.of(original), task, examples)
    save_checkpoint(checkpoint, view, tmp_path / "out")
    inputs = {"input_features": torch.as_tensor(examples.example_batch()["input_features"])}
    with torch.no_grad():
        assert largest_difference(run(module, inputs), run(load_checkpoint(tmp_path / "out").module, inputs)) == 0.0


def test_the_graph_of_a_classifier_that_reads_the_last_token(tmp_path: Path) -> None:
    """Half a sequence has no last token: the graph is compared at another length then."""
    view = ModelView.of(classifier())
    surgery.apply(view, EditPlan(edits=(DropHeads(layer=0, query=(1,)), DropHeads(layer=2, query=(0, 3)))))
    sample = sentences(2)
    sample["input_ids"][1] = [5, 6, 2, 0, 0, 0, 0, 0]
    sample["attention_mask"][1] = sample["input_ids"][1] != 0
    info = to_onnx(view.module, sample, tmp_path / "model.onnx", dynamic=dict.fromkeys(sample, (0, 1)))
    assert {found.shape for found in info.parity} == {"2x8", "1x8", "4x8", "2x9"}
    assert {found.output for found in info.parity} == {"logits", "encoder_last_hidden_state"}


class Alone(torch.nn.Module):
    """A module around one half of a model."""

    def __init__(self, half: torch.nn.Module) -> None:
        super().__init__()
        self.half = half

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.half(**inputs).last_hidden_state
        return states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoder", [False, True])
def test_one_half_of_a_model_is_viewed_alone(family: str, decoder: bool) -> None:
    """Multi-task models often hold the encoder only."""
    whole = two_layers(family)
    half: Any = whole.module.get_submodule("decoder" if decoder else "encoder")
    view = ModelView.of(Alone(half))
    same = [layer for layer in whole.attention if layer.family.decoder == decoder]
    assert [layer.module for layer in view.attention] == [layer.module for layer in same]
    assert [layer.family.causal for layer in view.attention] == [layer.family.causal for layer in same]
    assert [layer.path.partition(".")[2] for layer in view.attention] == [
        layer.path.partition(".")[2] for layer in same
    ]


def test_attention_to_an_encoder_that_is_not_there_is_named() -> None:
    view = ModelView.of(randomize(transformers.BartForCausalLM(bart_config())))
    assert [layer.family.cross for layer in view.attention] == [False, True]
    rows = [{"input_ids": np.arange(3, 9), "attention_mask": np.ones(6, dtype=np.int64)}]
    with pytest.raises(DataError, match=r"layer 1 \(model\.decoder\.layers\.0\.encoder_attn\) did not run"):
        collect(view, fidelity(), Examples.of(rows, source="x"), {Stat.CONTRIBUTION})


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_counts_encoder_and_decoder(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    found = inspect_checkpoint(str(tmp_path), sequence=8)
    assert [layer["query_heads"] for layer in found["layers"]] == [4, 4, 4]
    assert found["macs"] > found["attention_macs"] > 0
    # Only the decoder's attention to itself caches something for every token that it writes.
    assert found["kv_bytes_per_token"] == 2 * 2 * 4 * found["layers"][1]["head_dim"]
