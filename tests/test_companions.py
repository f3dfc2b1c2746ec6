"""Beside every graph: the configuration, and what feeds it."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from conftest import make_model, two_heads
from runs import make_tokenizer

from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.saving import save_checkpoint
from headwise.pipeline.companions import write_companions


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_the_tokenizer_that_the_recipe_names_comes_along(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "words")
    module = make_model("llama")
    named = Checkpoint(module=module, source="x", kind="transformers", digest="", processor=str(tmp_path / "words"))
    write_companions(named, None, tmp_path / "graph")
    written, given = (folder / "tokenizer.json" for folder in (tmp_path / "graph", tmp_path / "words"))
    assert written.read_bytes() == given.read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "graph").vocab_size > 4
    assert json.loads((tmp_path / "graph" / "config.json").read_text())["model_type"] == "llama"


def test_what_else_is_in_the_folder_of_a_checkpoint_stays_there(tmp_path: Path) -> None:
    source = Checkpoint(module=make_model("bert"), source="x", kind="transformers", digest="")
    save_checkpoint(source, source.view(), tmp_path / "model")
    (tmp_path / "model" / "training.json").write_text("{}")
    write_companions(load_checkpoint(tmp_path / "model"), None, tmp_path / "graph")
    assert names(tmp_path / "graph") == {"config.json"}


def test_a_plain_module_has_none(tmp_path: Path) -> None:
    plain = Checkpoint(module=two_heads(), source="x", kind="module", digest="", factory="x:y")
    write_companions(plain, None, tmp_path / "graph")
    assert names(tmp_path / "graph") == set()
