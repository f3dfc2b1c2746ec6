"""`headwise cost`: what weights and cache take, and how much text fits beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import LAYERS, make_model
from runs import finished

from headwise.cli import main
from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint
from headwise.model.saving import save_checkpoint
from headwise.pipeline.commands.memory import memory_cost, parse_size
from headwise.pipeline.report.document import REPORT, read_report


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small decoder that has lost one of four heads."""
    return finished("story", tmp_path_factory.getbasetemp())[0] / "out"


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("0.5 gib", 1 << 29), ("500MB", 500_000_000), ("1kB", 1000), ("4096", 4096), (".5KiB", 512)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 G", "eight", "-1MB", "1.2.3MB", "0GiB", "8GiB free"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="is no size of a memory"):
        parse_size(text)


def test_a_run_is_counted_before_and_after(run_folder: Path) -> None:
    found = memory_cost(str(run_folder), memory=1 << 20, batch=3)["models"]
    before, after = found["before"], found["after"]
    # Two layers, keys and values, of 4 and of 3 heads of width 8; two bytes each, and codes of one.
    assert (before["kv_bytes_per_token"], after["kv_bytes_per_token"]) == (2 * 2 * 32 * 2, 2 * 2 * 24)
    assert (before["kv_format"], after["kv_format"]) == (None, "int8")
    assert before["weight_bytes"] == 2 * before["parameters"] > after["weight_bytes"]
    for model in (before, after):
        used = model["weight_bytes"] + 3 * model["context"] * model["kv_bytes_per_token"]
        assert used <= 1 << 20 < used + 3 * model["kv_bytes_per_token"]
    assert after["context"] > before["context"]
    full = memory_cost(str(run_folder), memory=1 << 20, precision="fp32")["models"]["after"]
    assert full["weight_bytes"] == 2 * after["weight_bytes"]
    assert full["kv_bytes_per_token"] == after["kv_bytes_per_token"]
    assert memory_cost(str(run_folder), memory=10_000)["models"]["after"]["context"] == 0


def test_a_checkpoint_is_counted_as_it_is(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = run_folder / "01-prune-heads" / "model"
    alone = memory_cost(str(checkpoint), memory=1 << 20)["models"]["model"]
    after = memory_cost(str(run_folder), memory=1 << 20)["models"]["after"]
    assert alone["weight_bytes"] == after["weight_bytes"]
    assert alone["kv_bytes_per_token"] == 2 * after["kv_bytes_per_token"]
    bert: Any = make_model("bert")
    encoder = Checkpoint(module=bert, source="bert", kind="transformers", digest="")
    save_checkpoint(encoder, encoder.view(), tmp_path)
    found = memory_cost(str(tmp_path), memory=1 << 20)["models"]["model"]
    assert (found["kv_bytes_per_token"], found["context"]) == (0, None)
    assert len(encoder.view().attention) == LAYERS


def test_the_command_prints_a_table_or_json(run_folder: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "80"})
    table = runner.invoke(main, ["cost", str(run_folder), "--memory", "1MiB"])
    assert table.exit_code == 0
    assert "tokens in 1 MiB" in table.stdout
    assert "256 B" in table.stdout
    assert "96 B (int8)" in table.stdout
    plain = runner.invoke(main, ["cost", str(run_folder), "--json", "--batch", "2"])
    found = json.loads(plain.stdout)
    assert (found["memory_bytes"], found["batch"]) == (None, 2)
    assert found["models"]["after"]["context"] is None
    assert "tokens in" not in runner.invoke(main, ["cost", str(run_folder)]).stdout
    assert runner.invoke(main, ["cost", str(run_folder), "--memory", "much"]).exit_code == 2


def test_a_report_that_stopped_too_early_says_so(run_folder: Path, tmp_path: Path) -> None:
    report = read_report(run_folder)
    report["stages"][0]["cost"] = {}
    (tmp_path / REPORT).write_text(json.dumps(report))
    with pytest.raises(DataError, match="says nothing about the parameters of baseline"):
        memory_cost(str(tmp_path), memory=None)
