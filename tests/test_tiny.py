"""`headwise compress --tiny`: the architecture with two layers, the recipe cut to them, and no verdict on accuracy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from conftest import FACTORIES, MODELS
from runs import STORY, plain_files, run, text_files, write_recipe

from headwise.calibration.data import DataSpec
from headwise.cli import main
from headwise.errors import CheckpointError, HeadwiseError
from headwise.gates.judge import GateSpec, Outcome
from headwise.gates.measure import Measurement
from headwise.model.checkpoint import load_checkpoint
from headwise.model.tiny import shortened, tiny_checkpoint
from headwise.pipeline.bundle.parts import find_parts
from headwise.pipeline.recipe import load_recipe
from headwise.pipeline.regression.baseline import Baseline
from headwise.pipeline.regression.compare import accept, compare
from headwise.pipeline.report.document import read_report
from headwise.pipeline.tiny import NOT_JUDGED, judge_structure, shrink

CI_PAGE = Path(__file__).parents[1] / "docs" / "ci.md"
STOCK = sorted(MODELS.keys() - FACTORIES.keys())


@pytest.mark.parametrize("name", STOCK)
def test_every_family_keeps_its_heads(name: str, tmp_path: Path) -> None:
    module = MODELS[name]()
    module.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tiny = tiny_checkpoint(tmp_path / "model", tmp_path / "tiny")
    before, after = load_checkpoint(tmp_path / "model").view().layout, tiny.view().layout
    shapes = {(layer.query, layer.kv, layer.head_dim) for layer in before.attention}
    assert {(layer.query, layer.kv, layer.head_dim) for layer in after.attention} == shapes
    assert len(after.attention) <= len(before.attention)
    assert type(tiny.module) is type(module)
    assert tiny.digest == tiny_checkpoint(tmp_path / "model", tmp_path / "again").digest, "the same weights every time"


def test_layers_of_both_kinds_stay() -> None:
    kinds = ["sliding", "sliding", "full", "sliding", "sliding", "full"]
    values = {"num_hidden_layers": 6, "layer_types": kinds, "hidden_size": 9, "text_config": {"num_layers": 12}}
    assert shortened(values) == {
        "num_hidden_layers": 2,
        "layer_types": ["sliding", "full"],
        "hidden_size": 9,
        "text_config": {"num_layers": 2},
    }
    assert shortened({"num_hidden_layers": 3, "layer_types": ["full"] * 3})["layer_types"] == ["full"] * 2
    assert shortened({"encoder_layers": 1, "decoder_layers": 4}) == {"encoder_layers": 1, "decoder_layers": 2}


def test_a_sentence_encoder_without_a_pooler_gets_none(tmp_path: Path) -> None:
    for pooler in (False, True):
        folder = tmp_path / str(pooler)
        config = transformers.BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
        transformers.BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
        tiny = tiny_checkpoint(folder, tmp_path / f"tiny{pooler}")
        assert (tiny.module.pooler is not None) == pooler
        assert len(tiny.view().attention) == 2


def test_models_that_cannot_be_shortened_are_refused(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="was written by headwise, and its layers may differ"):
        tiny_checkpoint(folder / "checkpoint", tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="has no config that transformers can read"):
        tiny_checkpoint(tmp_path, tmp_path / "tiny")
    assert tiny_checkpoint("conftest:two_heads", tmp_path / "tiny").factory == "conftest:two_heads"


def test_options_with_an_entry_per_layer_are_cut() -> None:
    recipe = load_recipe(
        {
            "task": {"data": {"path": "a.npz"}},
            "calibration": {"data": {"path": "b.npz", "limit": 100}, "samples": 2048},
            "passes": [
                {"share-kv": {"kv_heads": [4, 2, 1, 1]}},
                {"prune-mlp": {"widths": [8, 16, 24, 32]}},
                {"prune-heads": {"ratio": 0.5}},
                {"latent-kv": {"rank": [3, 4]}},
                {"share-layers": {"groups": [[0, 1, 3], [2, 3]]}},
                {"quantize": {"matrices": {"layers.1.*": "fp8", "layers.3.*": "int4", "head": "float"}}},
            ],
        }
    )
    tiny = shrink(recipe, 2)
    share, mlp, heads, latent, layers = tiny.edits
    assert (share.kv_heads, mlp.widths, latent.rank, layers.groups) == ((4, 2), (8, 16), (3, 4), ((0, 1),))
    assert heads == recipe.edits[2]
    assert tiny.quantize is not None
    assert list(tiny.quantize.matrices) == ["layers.1.*", "head"]
    assert shrink(recipe, 1).edits[4].groups is None
    assert tiny.calibration is not None
    assert (tiny.task.data.limit, tiny.calibration.samples, tiny.calibration.data.limit) == (64, 64, 100)
    assert isinstance(tiny.task.data, DataSpec)


def test_numbers_are_not_judged_but_have_to_be_there() -> None:
    values = np.array([1.0, 0.0])
    found = Measurement(
        output="a",
        metric="accuracy",
        unit="points",
        higher_is_better=True,
        judged=True,
        reference=values,
        candidate=0 * values,
        labels=None,
    )
    verdict = judge_structure(found, GateSpec(max_drop=1), "onnx")
    assert (verdict.outcome, verdict.reason, verdict.samples, verdict.limit) == (Outcome.NOT_RUN, NOT_JUDGED, 2, 1)
    broken = judge_structure(replace(found, candidate=np.nan * values), GateSpec(), "onnx")
    assert (broken.outcome, broken.reason) == (Outcome.FAIL, "2 of 2 candidate values are NaN or infinite")


def test_the_whole_recipe_runs_beside_the_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_files(tmp_path / "text")
    recipe = {**STORY, "task": {"type": "sentence-similarity", "metric": "spearman", "data": {"path": "test.tsv"}}}
    recipe["calibration"] = {"data": {"path": "calibration.tsv"}}
    write_recipe(folder, {**recipe, "gate": {"max_drop": 0, "min_speedup": 1000}})
    done = run(folder, tiny=True)
    assert (done.outcome, done.exit_code) == ("pass", 0), done.reason
    assert done.reason == f"tiny: every stage works, accuracy was {NOT_JUDGED}"
    assert done.folder == folder / "out" / "tiny"
    assert not (folder / "out" / "report.json").exists()
    report = read_report(done.folder)
    assert report["tiny"] is True
    assert [stage["status"] for stage in report["stages"]] == ["passed"] * 4
    verdicts = [verdict for stage in report["stages"] for verdict in stage["verdicts"]]
    assert {(v["outcome"], v["reason"]) for v in verdicts} == {("NOT RUN", NOT_JUDGED)}
    assert {v["gate"] for v in verdicts} == {"accuracy", "speed"}
    assert report["stages"][1]["record"]["twin_error"] < 1e-3
    monkeypatch.chdir(folder)
    (command,) = re.findall(r"^headwise (compress .* --tiny)$", CI_PAGE.read_text(), re.MULTILINE)
    again = CliRunner().invoke(main, command.split())
    assert (again.exit_code, again.stdout.count("cached")) == (0, 4), again.output
    for judged in (
        lambda: compare(done.folder, Baseline.of(report, GateSpec())),
        lambda: accept(done.folder, tmp_path / "baseline.json"),
        lambda: find_parts(done.folder, report),
    ):
        with pytest.raises(HeadwiseError, match=r"is a tiny run, whose (accuracy means nothing|weights are random)"):
            judged()
    assert not (tmp_path / "baseline.json").exists()


def test_tiny_and_dry_run_exclude_each_other() -> None:
    result = CliRunner().invoke(main, ["compress", "x", "--recipe", "y", "--out", "z", "--tiny", "--dry-run"])
    assert result.exit_code == 2
    assert "--tiny and --dry-run together" in result.output
