"""The commands of the documentation are run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner
from runs import copied

from headwise.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with data, a recipe and the stages of a run of it, and `headwise` on the path."""
    folder = copied("plain", tmp_path_factory.getbasetemp(), tmp_path)
    (folder / "out" / "report.json").unlink()
    command = folder / "bin" / "headwise"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m headwise "$@"\n')
    command.chmod(0o755)
    return folder


def run(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    packages = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PATH": search, "PYTHONPATH": packages, **more}
    return subprocess.run(
        ["bash", "-e", "-c", script], check=False, cwd=folder, env=env, capture_output=True, text=True
    )


def blocks(page: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("headwise ")]


def test_gate_a_regression_in_ci(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    accept, check, _ = map(commands, blocks("ci.md"))
    done = [CliRunner().invoke(main, command) for command in (*accept, *check)]
    assert [result.exit_code for result in done] == [0, 0, 0, 0], done[-1].output
    assert (folder / "baseline.json").exists()
    assert (folder / "check.xml").exists()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["passes"] = [{"prune-heads": {"ratio": 0.75, "refit": False}}]
    recipe["gate"] = {"max_drop": 100}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = [CliRunner().invoke(main, command) for command in check]
    assert [result.exit_code for result in done] == [0, 1]
    assert "prune-heads digit accuracy" in done[-1].stdout
    assert "FAIL" in done[-1].stdout
    failures = ElementTree.parse(folder / "check.xml").getroot().findall(".//testsuite[@name='prune-heads']//failure")
    worse = re.findall(r"([0-9.]+) worse", " ".join(failure.get("message", "") for failure in failures))
    assert max(map(float, worse)) >= 2, "points"


def test_the_steps_of_the_github_action_are_those_commands(folder: Path) -> None:
    action: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    steps = {step["name"]: step for step in action["runs"]["steps"] if "name" in step}
    given = {
        "checkpoint": "checkpoint",
        "recipe": "recipe.yaml",
        "baseline": "baseline.json",
        "out": "out",
        "tiny": "false",
    }
    given["set"] = "passes.0.ratio=0.25\n\ngate.confidence=0.9"

    def script(name: str) -> subprocess.CompletedProcess[str]:
        env = {
            key: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: given[m[1]], v) for key, v in steps[name]["env"].items()
        }
        return run(steps[name]["run"], folder, **env)

    given["baseline"] = ""
    refused = script("compress")
    assert refused.returncode == 2, "before the run, not after it"
    assert "::error title=headwise::no baseline was given" in refused.stdout
    assert not (folder / "out" / "report.json").exists()
    given["baseline"] = "baseline.json"
    assert script("compress").returncode == 0
    assert script("check").returncode == 2, "there is no baseline yet"
    update = ["check", str(folder / "out"), "--against", str(folder / "baseline.json"), "--update"]
    assert CliRunner().invoke(main, update).exit_code == 0
    assert script("check").returncode == 0
    assert '"confidence": 0.9' in (folder / "baseline.json").read_text()
    given |= {"tiny": "true", "checkpoint": "conftest:two_heads"}
    assert script("compress").returncode == 0
    assert (folder / "out" / "tiny" / "report.json").exists()
    assert steps["check"]["if"] == "inputs.tiny != 'true'"
    used = set(re.findall(r"inputs\.(\w+)", (ROOT / "action.yml").read_text()))
    assert used == set(action["inputs"])


@pytest.mark.parametrize("page", ["compress.md", "speed.md"])
def test_pages_on_a_run(
    page: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("text", tmp_path_factory.getbasetemp(), tmp_path)
    monkeypatch.chdir(folder)
    recipes = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    if page == "compress.md":
        # Nothing of it is made again only as long as the page says what the run did.
        (folder / "recipe.yaml").write_text(recipes[0])
    found = [command for block in blocks(page) for command in commands(block)]
    assert len(found) > 1
    for command in found:
        # Two starts instead of six save the time of thirty processes.
        result = CliRunner().invoke(main, [*command, "--starts", "2"] if command[0] == "bench" else command)
        assert result.exit_code == 0, result.output
        if command[0] == "compress":
            assert result.stdout.count("cached") == 4
        if command[0] == "bench":
            assert "95 % interval" in " ".join(result.stdout.split())


def test_deploy_and_verify_a_bundle(folder: Path) -> None:
    make, verify, selftest, record, triton = blocks("deploy.md")
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = run(make, folder)
    assert done.returncode == 0, done.stderr
    assert 'PASS     golden    output "parity"' in done.stdout
    done = run(verify, folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "bundle" / "verified.json").read_text())["exit_code"] == 0
    for script in (selftest, record):
        done = run(script, folder / "bundle", PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
        assert done.returncode == 0, done.stderr
        assert "every byte as recorded" in done.stdout
    done = run(triton, folder)
    assert done.returncode == 0, done.stderr
    assert "config.pbtxt" in done.stdout
