"""`headwise convert`: a decoder converted with one layer in memory is the one that was converted as a whole."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import KV_HEADS, LAYERS, VOCABULARY, make_model
from safetensors.torch import load_file, save_file

from headwise.calibration.data import load_table
from headwise.calibration.tasks import make_task
from headwise.cli import main
from headwise.errors import (
    CheckpointError,
    DataError,
    HeadwiseError,
    PlanError,
    RecipeError,
    StorageError,
    UnsupportedModelError,
)
from headwise.model.blocks import Block, BlockSource
from headwise.model.checkpoint import load_checkpoint
from headwise.model.shards import INDEX, Shards, write_shard
from headwise.passes.base import run_pass
from headwise.pipeline.commands.blockwise import Blockwise
from headwise.pipeline.commands.convert import REPORT, convert
from headwise.pipeline.recipe import load_recipe

SHARE = {"share-kv": {"kv_heads": 1}}
LATENT = {"latent-kv": {"rank": 5}}


class Setup(NamedTuple):
    """A checkpoint in safetensors, and calibration tokens."""

    source: Path
    data: Path

    def recipe(self, *passes: Mapping[str, Any]) -> dict[str, Any]:
        data = {"path": str(self.data)}
        return {"task": {"data": data}, "calibration": {"data": data}, "passes": list(passes), "batch_size": 4}

    def written(self, *passes: Mapping[str, Any]) -> Path:
        path = self.data.with_name("recipe.json")
        path.write_text(json.dumps(self.recipe(*passes)))
        return path


def setup(folder: Path, family: str = "llama", **names: Any) -> Setup:
    """Three layers; some of the tokens are padding."""
    model: Any = make_model(family)
    model.save_pretrained(str(folder / "source"), **names)
    generator = np.random.default_rng(0)
    mask = np.ones((12, 9), np.int64)
    mask[3:6, 7:] = 0
    data = {"input_ids": generator.integers(3, VOCABULARY, (12, 9)), "attention_mask": mask}
    np.savez(folder / "tokens.npz", **data)
    return Setup(folder / "source", folder / "tokens.npz")


@pytest.fixture
def given(tmp_path: Path) -> Setup:
    return setup(tmp_path)


def whole(given: Setup, *passes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the same passes on the whole model."""
    recipe, checkpoint = load_recipe(given.recipe(*passes)), load_checkpoint(given.source)
    task = make_task(recipe.task)
    assert recipe.calibration is not None
    examples = task.encode(load_table(recipe.calibration.data, ()), checkpoint)
    view, teacher = checkpoint.copy().view(), checkpoint.copy().view()
    for pass_ in recipe.edits:
        run_pass(pass_, view, teacher, task, examples, batch_size=4)
    return view.module.state_dict()


def require_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


MEAN_KEYS = {"share-kv": {"kv_heads": 1, "merge_keys": "mean"}}
CASES: dict[str, tuple[str, list[dict[str, Any]], bool]] = {
    "share": ("llama", [SHARE], True),
    "some layers": ("llama", [{"share-kv": {"kv_heads": [2, 1, 2]}}], False),
    "latent": ("mistral", [LATENT], False),
    "latent of heads": ("llama", [{"latent-kv": {"energy": 0.9, "route": "heads"}}], False),
    "rebuilt": ("llama", [{"latent-kv": {"rank": 9, "route": "rebuild"}}], False),
    "both": ("llama", [SHARE, {"latent-kv": {"rank": [3, 4, 5]}}], False),
    "no refit": ("llama", [{"share-kv": {"kv_heads": [1, 2, 1], "refit": False}}, LATENT], False),
    "biases": ("qwen2", [{"share-kv": {"ratio": 0.5}}], True),
    "norms": ("qwen3", [MEAN_KEYS], True),
    "fused": ("phi3", [SHARE], True),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_by_layer_gives_the_weights_of_the_whole_model(case: str, tmp_path: Path) -> None:
    family, passes, stock = CASES[case]
    given = setup(tmp_path, family)
    report = convert(given.source, given.recipe(*passes), tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    require_equal(loaded.module.state_dict(), whole(given, *passes))
    assert report["stock"] is stock
    assert [layer["layer"] for layer in report["layers"]] == list(range(LAYERS))
    assert report["after"] == loaded.view().layout.to_json()
    if stock:
        plain = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
        require_equal(plain.state_dict(), loaded.module.state_dict())


def test_a_layer_of_its_own_window_runs_as_it_does_in_the_model(tmp_path: Path) -> None:
    config = make_model("qwen2").config
    assert isinstance(config, transformers.Qwen2Config)
    config.use_sliding_window, config.sliding_window = True, 2
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(str(tmp_path))
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        source = BlockSource(tmp_path)
        states = source.embed([ids[0]])
        for index in range(LAYERS - 1):
            block = source.block(index, states)
            states = states.like()
            states.put(torch.tensor([0]), block(torch.tensor([0]), torch.ones_like(ids)))
            assert torch.equal(states.flat, expected[index + 1][0])


def test_only_one_layer_is_in_memory(given: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    make, convert_one = BlockSource.block, Blockwise.convert

    def counted(self: BlockSource, index: int, states: Any) -> Block:
        assert not [thing for thing in alive if thing() is not None]
        assert all(tensor.is_meta for tensor in self.skeleton.state_dict().values())
        block = make(self, index, states)
        alive.append(weakref.ref(block))
        return block

    def watched(self: Blockwise, *rest: Any) -> Any:
        converted = convert_one(self, *rest)
        alive.extend(weakref.ref(tensor) for tensor in converted.tensors.values())
        return converted

    monkeypatch.setattr(BlockSource, "block", counted)
    monkeypatch.setattr(Blockwise, "convert", watched)
    convert(given.source, given.recipe(SHARE), tmp_path / "out")
    assert len(alive) > LAYERS


def test_shards_and_types_of_the_source_are_kept(given: Setup, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(given.source), dtype=torch.bfloat16)
    model.save_pretrained(str(given.source), max_shard_size="8KB")
    (given.source / "model.safetensors").unlink()
    assert len(set(Shards(given.source).files.values())) > LAYERS
    convert(given.source, given.recipe(LATENT), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert sorted(set(index.values())) == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    for name, tensor in (item for path in set(index.values()) for item in load_file(tmp_path / "out" / path).items()):
        assert tensor.dtype == (torch.int64 if name.endswith("frequencies") else torch.bfloat16)
    convert(given.source, given.recipe({"latent-kv": {"rank": 9, "route": "rebuild"}}), tmp_path / "rebuilt")
    assert Shards(tmp_path / "rebuilt").dtype("model.layers.1.self_attn.angles") == torch.float32
    # What a layer is refitted on is what the layers before it are on disk.
    loaded = load_checkpoint(tmp_path / "out")
    recipe = load_recipe(given.recipe(LATENT))
    source = BlockSource(given.source)
    examples = make_task(recipe.task).encode(load_table(recipe.task.data, ()), loaded)
    blocks = Blockwise(source, recipe.edits, make_task(recipe.task), examples, {"batch_size": 4, "seed": 0})
    streams = blocks.convert(0, blocks.start()).streams
    seen: list[torch.Tensor] = []
    layer: Any = loaded.module
    layer.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        loaded.module(input_ids=blocks.tokens[0][None])
    assert torch.allclose(streams[1].flat[:9], seen[0][0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(streams[0].flat[:9], seen[0][0], rtol=1e-3, atol=1e-3)


def test_an_interrupted_conversion_goes_on(given: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = convert(given.source, given.recipe(SHARE), tmp_path / "once")
    made: list[int] = []
    real = Blockwise.convert

    def killed(self: Blockwise, index: int, *rest: Any) -> Any:
        if index == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(index)
        return real(self, index, *rest)

    monkeypatch.setattr(Blockwise, "convert", killed)
    out, recipe = tmp_path / "out", given.recipe(SHARE)
    with pytest.raises(KeyboardInterrupt):
        convert(given.source, recipe, out)
    assert not (out / REPORT).exists()
    assert not (out / "config.json").exists()
    made.append(-1)
    report = convert(given.source, recipe, out)
    assert made == [0, 1, -1, 2]
    assert report["after"] == expected["after"]
    require_equal(load_checkpoint(out).module.state_dict(), load_checkpoint(tmp_path / "once").module.state_dict())
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert convert(given.source, recipe, out) == json.loads(json.dumps(report))
    assert made == [0, 1, -1, 2]
    # Other options, a damaged shard, or the wish to begin again.
    convert(given.source, given.recipe({"share-kv": {"kv_heads": 1, "refit": False}}), out)
    assert made[4:] == [0, 1, 2]
    (out / report["layers"][1]["file"]).write_bytes(b"")
    convert(given.source, given.recipe({"share-kv": {"kv_heads": 1, "refit": False}}), out)
    convert(given.source, given.recipe({"share-kv": {"kv_heads": 1, "refit": False}}), out, resume=False)
    assert made[4:] == [0, 1, 2] * 3


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def test_the_command(given: Setup, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(given.source, "--recipe", given.written(SHARE), "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{KV_HEADS} -> 1" in result.stdout
    assert "loads with plain transformers" in result.stderr
    as_json = call(given.source, "--recipe", given.written(SHARE), "--out", out, "--json", "--no-resume")
    assert json.loads(as_json.stdout)["stock"] is True
    ranked = call(given.source, "--recipe", given.written(LATENT), "--set", "passes.0.budget=0.5", "--out", out)
    assert (ranked.exit_code, "give one of rank" in ranked.stderr) == (2, True)


def test_heads_keep_their_ids_over_two_conversions(given: Setup, tmp_path: Path) -> None:
    first = convert(given.source, given.recipe(SHARE), tmp_path / "first")
    second = convert(tmp_path / "first", given.recipe(LATENT), tmp_path / "second")
    assert second["before"] == first["after"]
    assert second["after"]["attention"][0]["query"] == first["after"]["attention"][0]["query"]


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(given: Setup, kind: type[HeadwiseError], text: str, *passes: Mapping[str, Any]) -> None:
    out = given.data.with_name("refused")
    with pytest.raises(kind, match=text):
        convert(given.source, given.recipe(*passes or [SHARE]), out)


def test_passes_that_look_at_all_layers_are_refused(given: Setup) -> None:
    refused(given, PlanError, "a budget is spread over all layers together", {"latent-kv": {"budget": 0.5}})
    refused(given, PlanError, "prune-heads decides over all layers together", {"prune-heads": {"ratio": 0.5}})
    refused(given, PlanError, "no layer has more kv heads", {"share-kv": {"kv_heads": 2}})
    refused(given, PlanError, "rank has 2 entries", {"latent-kv": {"rank": [3, 4]}})
    refused(given, RecipeError, "passes are share-kv, share-kv", SHARE, SHARE)
    refused(given, RecipeError, "passes are share-kv, quantize", SHARE, {"quantize": {}})
    with pytest.raises(RecipeError, match="no pass that edits"):
        convert(given.source, given.recipe(), given.data.with_name("refused"))


def test_an_error_names_its_layer(given: Setup) -> None:
    refused(given, PlanError, "block 0, as a model of its own: .*rotary: 5", {"latent-kv": {"rank": 3, "rotary": 5}})


def test_calibration_has_to_be_tokens(given: Setup) -> None:
    np.savez(given.data, inputs_embeds=np.zeros((4, 9, 32), np.float32))
    refused(given, DataError, "the calibration samples are inputs_embeds")


def test_what_is_no_directory_of_safetensors_is_refused(given: Setup, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        convert("org/model", given.recipe(SHARE), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is also --out"):
        convert(given.source, given.recipe(SHARE), given.source)
    (given.source / "model.safetensors").write_bytes(b"nothing")
    refused(given, CheckpointError, "model.safetensors cannot be read")
    (given.source / "model.safetensors").unlink()
    refused(given, CheckpointError, "holds no .* file")


def test_weights_that_do_not_fit_are_refused(given: Setup) -> None:
    path = given.source / "model.safetensors"
    tensors, key = load_file(path), "model.layers.1.self_attn.k_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    refused(given, CheckpointError, f"has no {key}")
    save_file({**tensors, key: tensors[key][:3].clone()}, path)
    refused(given, CheckpointError, f"has {key} of shape \\(3, 32\\)")
    # As in transformers, a tensor that the model does not have is left out.
    save_file({**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3)}, path)
    convert(given.source, given.recipe(SHARE), given.data.with_name("out"))
    save_file({**tensors, key: tensors[key] * torch.nan}, path)
    refused(given, CheckpointError, f"{key} holds NaN")
    (given.source / "config.json").write_text("{}")
    refused(given, CheckpointError, "source cannot be read")


def test_blocks_that_need_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    refused(setup(tmp_path, "gpt2"), UnsupportedModelError, "blocks of gpt2 are not known to run alone")


def test_a_folder_with_something_else_in_it_is_left_alone(given: Setup, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds something else"):
        convert(given.source, given.recipe(SHARE), tmp_path)
    assert given.source.exists()


def test_a_disk_without_room_is_refused(given: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(StorageError, match=r"0\.0 GB are free"):
        convert(given.source, given.recipe(SHARE), tmp_path / "out")


def test_a_shard_that_cannot_be_written_leaves_nothing_behind(
    given: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*rest: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("headwise.model.shards.save_file", full)
    with pytest.raises(StorageError, match="no space left"):
        write_shard(tmp_path / "new.safetensors", {})
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        convert(given.source, given.recipe(SHARE), tmp_path / "file" / "out")
