"""Checkpoints: what is saved comes back bit for bit, and what cannot be used is refused with the reason."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FACTORIES, IMAGES, STOCK, largest_difference, make_inputs, make_model
from safetensors.torch import load_file, save_file
from torch import nn

from headwise.errors import CheckpointError, DataError, PlanError, StorageError, UnsupportedModelError
from headwise.model import surgery
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import DropHeads, EditPlan
from headwise.model.forward import run
from headwise.model.layout import Layout
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView


def checkpoint_of(family: str) -> Checkpoint:
    factory = FACTORIES.get(family)
    kind = "transformers" if factory is None else "module"
    return Checkpoint(module=make_model(family), source=family, kind=kind, digest="", factory=factory)


def prune(view: ModelView, *, equal: bool) -> None:
    layers = [0, 1, 2] if equal else [0, 2]
    edits = [DropHeads(layer=i, query=view.layout.attention[i].units()[i % 2]) for i in layers]
    surgery.apply(view, EditPlan(edits=tuple(edits)))


@pytest.mark.parametrize("equal", [True, False])
def test_round_trip_is_bit_exact(family: str, equal: bool, tmp_path: Path) -> None:
    checkpoint, inputs = checkpoint_of(family), make_inputs(family)
    view = checkpoint.view()
    prune(view, equal=equal)
    with torch.no_grad():
        before = run(view.module, inputs)
    save_checkpoint(checkpoint, view, tmp_path)
    loaded = load_checkpoint(tmp_path)
    with torch.no_grad():
        assert largest_difference(before, run(loaded.module, inputs)) == 0.0
    assert loaded.view().layout == view.layout
    assert loaded.kind == checkpoint.kind
    assert not loaded.module.training


@pytest.mark.parametrize("family", sorted(STOCK))
def test_equal_layers_load_with_plain_transformers(family: str, tmp_path: Path) -> None:
    checkpoint, inputs = checkpoint_of(family), make_inputs(family)
    view = checkpoint.view()
    prune(view, equal=True)
    save_checkpoint(checkpoint, view, tmp_path)
    auto = transformers.AutoModel if family in IMAGES | {"t5"} else transformers.AutoModelForCausalLM
    stock = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert largest_difference(run(view.module, inputs), run(stock, inputs)) == 0.0


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_unequal_layers_never_load_wrongly_with_plain_transformers(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    prune(view, equal=False)
    save_checkpoint(checkpoint, view, tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(checkpoint.module).from_pretrained(tmp_path)


def test_a_loaded_checkpoint_is_pruned_again_under_original_ids(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family)
    view = checkpoint.view()
    prune(view, equal=False)
    save_checkpoint(checkpoint, view, tmp_path / "once")
    again = load_checkpoint(tmp_path / "once")
    second = again.view()
    surgery.apply(second, EditPlan(edits=(DropHeads(layer=1, query=second.layout.attention[1].units()[0]),)))
    save_checkpoint(again, second, tmp_path / "twice")
    assert load_checkpoint(tmp_path / "twice").view().layout == second.layout
    assert second.layout.attention[0] == view.layout.attention[0]


def test_tokenizer_files_travel_and_still_load(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model("llama").save_pretrained(source)
    write_tokenizer(source)
    checkpoint = load_checkpoint(source)
    view = checkpoint.view()
    prune(view, equal=False)
    save_checkpoint(checkpoint, view, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.tokenizer()("3 4 5")["input_ids"] == checkpoint.tokenizer()("3 4 5")["input_ids"] != []


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0").save_pretrained(folder)


def test_the_digest_changes_with_a_weight(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    first = load_checkpoint(tmp_path).digest
    assert load_checkpoint(tmp_path).digest == first
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).digest != first


def test_nan_weights_are_refused_with_their_name(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("query.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"query\.weight holds NaN"):
        load_checkpoint(tmp_path)


def test_a_missing_head_is_refused_instead_of_made_up(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no weights for classifier"):
        load_checkpoint(tmp_path)


def test_a_missing_pooler_is_left_out(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with torch.no_grad():
        assert list(run(load_checkpoint(tmp_path).module, make_inputs("bert"))) == ["last_hidden_state"]


def test_an_unknown_model_type_names_itself_and_the_known_ones(tmp_path: Path) -> None:
    config = transformers.MPNetConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    transformers.MPNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r'"mpnet" has no family record\n  expected: one of: .*bert'):
        load_checkpoint(tmp_path).view()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no-such-folder-or-hub-id", "cannot be loaded"),
        ("no_such_module:factory", "cannot be imported"),
        ("conftest:no_such_factory", "cannot be imported"),
        ("conftest:largest_difference", r"\(\) failed: TypeError"),
        ("builtins:dict", "returned dict"),
    ],
)
def test_a_bad_reference_says_what_would_be_right(ref: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(ref)


def test_a_file_or_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor"):
        load_checkpoint(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        load_checkpoint(tmp_path / "weights.bin")
    (tmp_path / "headwise.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("torch")
    save_checkpoint(checkpoint, checkpoint.view(), tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights do not fit"):
        load_checkpoint(tmp_path)


def test_a_layout_of_another_shape_is_refused() -> None:
    view = ModelView.of(make_model("bert"))
    with pytest.raises(PlanError, match="which is what the weights have"):
        view.rename(Layout(attention=tuple(entry.without([0]) for entry in view.layout.attention)))


def test_a_module_without_a_tokenizer_says_so() -> None:
    with pytest.raises(DataError, match="no tokenizer in torch: a plain module has none of its own"):
        checkpoint_of("torch").tokenizer()


def test_a_factory_is_loaded_with_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("torch", seed=3)
    module = types.ModuleType("trained_elsewhere")
    module.build = lambda: model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trained_elsewhere", module)
    loaded = load_checkpoint("trained_elsewhere:build")
    assert loaded.kind == "module"
    assert loaded.factory == "trained_elsewhere:build"
    assert isinstance(loaded.module, nn.Module)


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("headwise.model.saving.save_file", no_space)
    checkpoint = checkpoint_of("torch")
    with pytest.raises(StorageError, match=r"no space left on the device.*\n.*\n.*finished stages are kept"):
        save_checkpoint(checkpoint, checkpoint.view(), tmp_path)
