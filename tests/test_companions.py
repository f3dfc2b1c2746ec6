"""Beside every graph: the configuration, and what feeds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from bundles import with_engines
from conftest import make_model, two_heads
from runs import finished

from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.saving import save_checkpoint
from headwise.pipeline.companions import write_companions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_every_graph_of_a_run_has_them(base: Path) -> None:
    given = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for folder in (finished("story", base)[0], with_engines("story", base)):
        graphs = [path.parent for path in (folder / "out").glob("*/model.onnx") if "." not in path.parent.name]
        assert len(graphs) > 2
        for graph in graphs:
            assert given <= names(graph)
            for name in given - {"config.json"}:
                assert (graph / name).read_bytes() == (folder / "checkpoint" / name).read_bytes()


def test_the_configuration_is_that_of_the_compressed_model(base: Path) -> None:
    folder, _ = finished("story", base)
    written = [folder / "out" / path / "config.json" for path in ("02-onnx", "03-cpu", "01-prune-heads/model")]
    assert len({path.read_bytes() for path in written}) == 1


def test_the_tokenizer_that_the_recipe_names_comes_along(base: Path, tmp_path: Path) -> None:
    folder, _ = finished("story", base)
    module = make_model("llama")
    named = Checkpoint(module=module, source="x", kind="transformers", digest="", processor=str(folder / "checkpoint"))
    write_companions(named, None, tmp_path / "graph")
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
