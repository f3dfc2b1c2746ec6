"""The command line: options, output, exit codes. Runs in this process where it can."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import DECODERS, GROUPED, HEADS, KV_HEADS, LAYERS, MODELS, WIDTH, make_model
from runs import PLAIN, copied, finished, plain_files, write_recipe

import headwise
from headwise.cli import main
from headwise.device import cuda
from headwise.model.checkpoint import Checkpoint
from headwise.model.limits import limits
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes import PASSES
from headwise.pipeline import run, stages
from headwise.pipeline.commands import evaluation
from headwise.pipeline.monitor import RichMonitor
from headwise.pipeline.run import Run
from headwise.pipeline.store import installed_version

COMMANDS: dict[str, list[str]] = {
    "bench": [
        *("artifacts", "--provider", "--threads", "--batch", "--seq", "--past", "--vocabulary", "--rounds", "--starts"),
        *("--warmup", "--confidence", "--roofline", "--gpu", "--ssh", "--port", "--identity", "--python", "--json"),
    ],
    "bundle": ["directory", "--out", "--samples", "--triton"],
    "check": ["directory", "--against", "--update", "--junit", "--json"],
    "cost": ["artifact", "--memory", "--batch", "--precision", "--json"],
    "compress": [
        *("checkpoint", "--recipe", "--out", "--set", "--no-resume", "--dry-run", "--require-engine-run", "--tiny")
    ],
    "convert": ["checkpoint", "--recipe", "--out", "--set", "--no-resume", "--json"],
    "demo": ["--out"],
    "evaluate": ["artifact", "--recipe", "--reference", "--set", "--json"],
    "generate": [
        *(
            "artifact",
            "--prompt",
            "--prompts-file",
            "--max-new-tokens",
            "--batch",
            "--temperature",
            "--top-k",
            "--seed",
        ),
        *("--runtime", "--tokenizer", "--json"),
    ],
    "inspect": ["checkpoint", "--json", "--sequence"],
    "passes": [],
    "plan": ["checkpoint", "--recipe", "--set", "--json"],
    "to-hf": ["artifact", "--out"],
    "report": ["directory", "--html", "--markdown", "--junit"],
    "schema": [],
    "verify": ["bundle", "--engine", "--onnx", "--selftest", "--record", "--rounds", "--tolerance", "--json"],
}
"""Scripts rely on these: taking one away or renaming it is a breaking change."""


def headwise_command(*arguments: str | Path, columns: int = 80) -> Result:
    """Run a command here. Its exit code, standard output and error output."""
    result = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"}).invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run on the plain module."""
    return copied("plain", tmp_path_factory.getbasetemp(), tmp_path)


@pytest.fixture
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """The finished run itself, only to read."""
    return finished("plain", tmp_path_factory.getbasetemp())


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A finished run on a BERT with text, only to read."""
    return finished("text", tmp_path_factory.getbasetemp())


def compress(folder: Path, *arguments: str) -> Result:
    return headwise_command(
        *("compress", folder / "checkpoint", "--recipe", folder / "recipe.yaml", "--out", folder / "out", *arguments)
    )


# ---------------------------------------------------------------------------------------------- all commands


def test_commands_and_options_are_these() -> None:
    found = {
        name: [
            parameter.human_readable_name if isinstance(parameter, click.Argument) else parameter.opts[0]
            for parameter in command.params
        ]
        for name, command in main.commands.items()
    }
    assert {name: sorted(p.lower() for p in ps) for name, ps in found.items()} == {
        name: sorted(parameters) for name, parameters in COMMANDS.items()
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str) -> None:
    result = headwise_command(command, "--help")
    assert result.exit_code == 0
    for parameter in COMMANDS[command]:
        assert (parameter if parameter.startswith("--") else parameter.upper()) in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 84
    assert headwise_command(command, "-h").stdout == result.stdout


def test_help_lists_every_command_in_full_and_the_exit_codes() -> None:
    text = headwise_command("--help").stdout
    for name in COMMANDS:
        assert f"  {name}" in text
    assert "..." not in text.split("Commands:")[1], "the first sentence of a command's help is too long for the list"
    assert "130 interrupted" in text


def test_version() -> None:
    assert headwise_command("--version").stdout == f"headwise, version {headwise.__version__}\n"


def test_the_version_is_that_of_the_code_installed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", nothing_is_installed)
    assert installed_version("headwise") == headwise.__version__
    assert installed_version("torch") is None
    assert CliRunner().invoke(main, ["--version"]).stdout == f"headwise, version {headwise.__version__}\n"


@pytest.mark.parametrize(
    "statement", ["import headwise", "import headwise.cli", "from headwise.cli import main; main(['--help'])"]
)
def test_help_and_import_load_nothing_heavy(statement: str) -> None:
    code = f"import atexit, sys\natexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]))\n{statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "scipy", "pydantic", "matplotlib", "pandas", "rich")


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "here"),
        ("compress", "here", "--recipe", "r.yaml"),
        ("plan", "here"),
        ("inspect",),
        ("inspect", "here", "--sequence", "0"),
        ("no-such-command",),
        ("report", "a", "b"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    result = headwise_command(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_a_bug_keeps_its_traceback_and_is_not_taken_for_a_failed_gate(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(run, "load_checkpoint", broken)
    result = compress(folder)
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "error: ZeroDivisionError: oops\n  expected: " in result.stderr


def test_ctrl_c_while_loading_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_checkpoint", interrupted)
    result = compress(folder)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.strip().endswith("interrupted")


def test_no_progress_bar_is_left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RichMonitor] = []
    start = RichMonitor.start

    def remember(self: RichMonitor, stage: str) -> None:
        seen.append(self)
        start(self, stage)

    monkeypatch.setattr(RichMonitor, "start", remember)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the error output for a terminal
    for arguments in (("--set", "taks=1"), ("--set", "task.data.path=nothing.npz"), ("--set", "gate.max_drop=3")):
        compress(folder, *arguments)
    headwise_command("inspect", "no/such/checkpoint")
    assert len({id(monitor) for monitor in seen}) >= 4
    assert all(monitor.console.is_terminal for monitor in seen)
    assert not any(monitor.bars.live.is_started or monitor.bars.tasks for monitor in seen)


# ---------------------------------------------------------------------------------------------- compress


def test_compress_prints_stages_table_and_where_the_report_is(folder: Path) -> None:
    result = compress(folder)
    assert result.exit_code == 0
    stage_lines = [line.split()[:2] for line in result.stderr.splitlines() if line.strip()]
    assert stage_lines == [[name, "passed"] for name in ("baseline", "prune-heads", "onnx", "fp16")]
    assert "(cached)" in result.stderr
    assert "PASS (exit 0)" in result.stdout
    assert result.stdout.rstrip().endswith(f"Report: {folder / 'out' / 'report.html'}")
    table = result.stdout.split("Report: ")[0]
    assert max(map(len, table.splitlines())) <= 80


def test_compress_ends_with_1_when_a_gate_says_no(folder: Path) -> None:
    result = compress(folder, "--set", "passes.0.ratio=0.75", "--set", "passes.0.refit=false")
    assert result.exit_code == 1
    assert "FAIL (exit 1)" in result.stdout
    assert "the gate after prune-heads said no" in " ".join(result.stdout.split())
    assert "made again (changed: options)" in result.stderr


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("gate.max_dorp=1", 'did you mean "max_drop"?'),
        ("task.data.path=nothing.npz", "nothing.npz"),
        ("calibration.data.path=test.npz", "calibrate on the training split"),
        ("targets=[sm99]", "unknown target"),
    ],
)
def test_mistakes_end_with_2_and_three_lines(folder: Path, override: str, text: str) -> None:
    result = compress(folder, "--set", override)
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr
    lines = result.stderr.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "  expected", "  do this"]


def test_a_recipe_that_is_not_there(folder: Path) -> None:
    result = headwise_command("compress", folder / "checkpoint", "--recipe", "no.yaml", "--out", folder / "new")
    assert result.exit_code == 2
    assert "the recipe no.yaml cannot be read: No such file" in result.stderr
    assert not (folder / "new").exists()


def test_an_output_folder_that_is_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    result = headwise_command(
        *("compress", folder / "checkpoint", "--recipe", folder / "recipe.yaml", "--out", folder / "file")
    )
    assert result.exit_code == 3
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.stderr


def test_engines_that_cannot_be_run_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.device import builder, runtimes

    monkeypatch.setattr(builder, "gpu", lambda: None)
    monkeypatch.setattr(stages, "gpu", lambda: None)
    result = compress(folder, "--set", "targets=[jetson-orin]")
    assert result.exit_code == 0
    assert "NOT RUN" in result.stdout
    result = compress(folder, "--set", "targets=[jetson-orin]", "--require-engine-run")
    assert result.exit_code == 4
    assert "NOT-RUN (exit 4)" in result.stdout
    assert compress(folder, "--require-engine-run").exit_code == 2
    monkeypatch.setitem(runtimes.MODULES, "tensorrt-rtx", "no_such_builder")
    result = compress(folder, "--set", "targets=[sm86]")
    assert result.exit_code == 4
    assert "pip install no_such_builder" in result.stdout


def test_no_resume(folder: Path) -> None:
    result = compress(folder, "--no-resume", "--set", "export.precision=fp32")
    assert result.exit_code == 0
    assert "00-baseline: made again (--no-resume)" in result.stderr
    assert "(cached)" not in result.stderr


def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    folder = plain_files(tmp_path / "f")
    before = sorted(folder.rglob("*"))
    result = compress(folder, "--dry-run", "--set", "passes.0.ratio=0.5")
    assert result.exit_code == 0
    printed = yaml.safe_load(result.stdout)
    assert printed["passes"][0]["prune-heads"]["ratio"] == 0.5
    assert printed["gate"]["resamples"] == 1000
    assert compress(folder, "--dry-run", "--set", "targets=[sm75]", "--set", "export.precision=bf16").exit_code == 2
    assert sorted(folder.rglob("*")) == before


def test_compress_takes_a_factory(folder: Path) -> None:
    recipe = write_recipe(folder, {**PLAIN, "passes": [], "export": {"precision": "fp32"}})
    result = headwise_command("compress", "test_cli:seeded", "--recipe", recipe, "--out", folder / "new", "--dry-run")
    assert result.exit_code == 0, result.stderr
    result = headwise_command("compress", "test_cli:nothing", "--recipe", recipe, "--out", folder / "new", "--dry-run")
    assert result.exit_code == 2
    assert "module:factory" in result.stderr


def seeded() -> Any:
    return make_model("torch")


# ---------------------------------------------------------------------------------------------- inspect, plan, passes


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "gemma2", "clip", "torch"])
def test_inspect(tmp_path: Path, name: str) -> None:
    module: Any = make_model(name)
    if name == "torch":
        source = "conftest:two_heads"
        checkpoint = Checkpoint(module=module, source=source, kind="module", digest="", factory=source)
        save_checkpoint(checkpoint, checkpoint.view(), tmp_path)
    else:
        module.save_pretrained(tmp_path)
    result = headwise_command("inspect", tmp_path, "--json", "--sequence", "16")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    kv_heads = KV_HEADS if name in GROUPED else HEADS
    assert [(layer["query_heads"], layer["kv_heads"]) for layer in found["layers"]] == [(HEADS, kv_heads)] * LAYERS
    neurons = 4 * WIDTH if name == "gpt2" else 48
    assert [(mlp["neurons"], mlp["width"]) for mlp in found["mlps"]] == [(neurons, neurons)] * LAYERS
    assert [layer["mlp"] for layer in found["layers"]] == list(range(LAYERS))
    assert found["parameters"] == sum(p.numel() for p in module.parameters())
    assert found["model_type"] == (name if name in MODELS and name != "torch" else "TwoHeads")
    if name == "torch":
        assert found["macs"] is None
        assert "counts them from its data" in found["macs_note"]
    else:
        assert 0 < found["attention_macs"] < found["macs"]
    # Keys and values of 2 bytes in every layer and kv head; nothing is cached where attention looks both ways.
    width = 6 if name in GROUPED else 8
    assert found["kv_bytes_per_token"] == (2 * 2 * LAYERS * kv_heads * width if name in DECODERS else 0)
    assert found["limits"] == list(limits(ModelView.of(module)))
    table = headwise_command("inspect", tmp_path).stdout
    shown = "".join(table.split())
    assert all("".join(limit.split()) in shown for limit in found["limits"])
    assert ("limits\n" in table) == bool(found["limits"])
    assert max(map(len, table.splitlines())) <= max(80, len(str(tmp_path)) + 60)
    assert f"{found['parameters']:,}" in table
    assert found["layers"][0]["path"] in table


def test_inspect_a_pruned_checkpoint(done: tuple[Path, Run]) -> None:
    found = json.loads(headwise_command("inspect", done[1].folder / "01-prune-heads" / "model", "--json").stdout)
    assert [layer["query"] for layer in found["layers"]] == [[0, 1, 2]] * LAYERS


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        ("no/such/folder", "no/such/folder cannot be loaded"),
        ("no_such_module:factory", "cannot be imported"),
        ("conftest:make_inputs", "failed: TypeError"),
        (str(Path(__file__).parent), "has neither config.json nor headwise.json"),
        (__file__, "is a file"),
    ],
)
def test_inspect_what_is_no_checkpoint(checkpoint: str, found: str) -> None:
    result = headwise_command("inspect", checkpoint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert found in result.stderr


def test_plan_shows_scores_and_changes_nothing(done: tuple[Path, Run]) -> None:
    folder = done[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    arguments = ("plan", folder / "checkpoint", "--recipe", folder / "recipe.yaml", "--set", "passes.0.ratio=0.5")
    table = headwise_command(*arguments)
    plans = json.loads(headwise_command(*arguments, "--json").stdout)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert table.exit_code == 0
    assert "prune-heads: 6 of 12 query heads, 6 of 12 kv heads would go" in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 80
    assert [len(layer) for layer in plans[0]["plan"]["scores"]["layers"]] == [HEADS] * LAYERS
    assert sum(len(edit["query"]) for edit in plans[0]["plan"]["edits"]) == 6
    assert plans[0]["options"]["ratio"] == 0.5


def test_plan_without_passes_and_with_too_much(done: tuple[Path, Run]) -> None:
    arguments = ("plan", done[0] / "checkpoint", "--recipe", done[0] / "recipe.yaml", "--set")
    assert "the recipe has no passes" in headwise_command(*arguments, "passes=[]").stdout
    result = headwise_command(*arguments, "passes.0.ratio=0.95")
    assert result.exit_code == 2
    assert "only 9 can" in result.stderr


def test_passes_lists_every_option() -> None:
    shown = headwise_command("passes", columns=200).stdout
    for name, options in PASSES.items():
        section = shown.split(f"{name}: {options.summary}")[1].split("\n\n")[0]
        for option, field in options.model_fields.items():
            line = next(line for line in section.splitlines() if line.split()[:1] == [option])
            assert ("required" in line) == field.is_required()
            assert len(line.split()) > 3, f"{option} has no meaning"


# ---------------------------------------------------------------------------------------------- evaluate


def evaluate(folder: Path, artifact: str | Path, *arguments: str | Path) -> Result:
    return headwise_command("evaluate", artifact, "--recipe", folder / "recipe.yaml", *arguments)


def test_evaluate_a_checkpoint(done: tuple[Path, Run]) -> None:
    folder, finished_run = done
    found = json.loads(evaluate(folder, folder / "checkpoint", "--json").stdout)
    assert (found["samples"], found["runner"], found["reference"]) == (60, "torch", None)
    baseline = [m for m in finished_run.report["stages"][0]["metrics"] if m["judged"]]
    assert [(m["output"], m["metric"], m["value"]) for m in found["metrics"]] == [
        (m["output"], m["metric"], m["value"]) for m in baseline
    ]
    table = evaluate(folder, folder / "checkpoint").stdout
    assert "digit" in table
    assert "accuracy" in table
    assert "fidelity" not in table, "a model agrees with itself: that says nothing"


@pytest.mark.parametrize("graph", ["02-onnx/model.onnx", "03-fp16/model.onnx"])
def test_evaluate_a_graph_finds_its_checkpoint(
    text: tuple[Path, Run], graph: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, finished_run = text
    monkeypatch.chdir(tmp_path)
    result = evaluate(folder, finished_run.folder / graph, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    stage = next(s for s in finished_run.report["stages"] if s["name"] == graph[3:].split("/")[0])
    assert found["runner"] == "onnxruntime"
    assert found["metrics"][0]["value"] == pytest.approx(stage["metrics"][0]["value"], abs=1e-6)


def test_evaluate_needs_no_calibration_data(folder: Path) -> None:
    (folder / "calibration.npz").unlink()
    assert evaluate(folder, folder / "checkpoint").exit_code == 0


def test_evaluate_against_a_reference(folder: Path) -> None:
    pruned = folder / "out" / "01-prune-heads" / "model"
    result = evaluate(folder, pruned, "--reference", folder / "checkpoint", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == found["exit_code"] == 0
    assert {m["metric"] for m in found["metrics"]} == {"accuracy", "f1", "fidelity"}
    assert [v["outcome"] for v in found["verdicts"]] == ["PASS", "PASS"]
    compress(folder, "--set", "passes.0.ratio=0.75", "--set", "passes.0.refit=false")
    result = evaluate(folder, pruned, "--reference", folder / "checkpoint", "--set", "gate.max_drop=0.5")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "not judged" in result.stdout


def test_evaluate_fidelity_needs_a_reference(folder: Path) -> None:
    task = {"type": "fidelity", "data": {"path": "test.npz", "columns": {"tokens": "tokens"}}}
    write_recipe(folder, {**PLAIN, "task": task})
    result = evaluate(folder, folder / "checkpoint")
    assert result.exit_code == 2
    assert "add --reference CHECKPOINT" in result.stderr
    result = evaluate(folder, folder / "out" / "02-onnx" / "model.onnx", "--reference", folder / "checkpoint", "--json")
    assert result.exit_code == 0, result.stderr
    assert {m["metric"] for m in json.loads(result.stdout)["metrics"]} == {"fidelity"}


def test_evaluate_a_graph_from_nowhere(folder: Path, tmp_path: Path) -> None:
    graph = tmp_path / "a" / "alone.onnx"
    graph.parent.mkdir()
    graph.write_bytes((folder / "out" / "02-onnx" / "model.onnx").read_bytes())
    result = evaluate(folder, graph)
    assert result.exit_code == 2
    assert "add --reference CHECKPOINT" in result.stderr
    assert evaluate(folder, graph, "--reference", folder / "checkpoint").exit_code == 0
    result = evaluate(folder, tmp_path / "none.onnx", "--reference", folder / "checkpoint")
    assert result.exit_code == 2
    assert "none.onnx does not exist" in result.stderr
    graph.write_bytes(b"not a graph")
    result = evaluate(folder, graph, "--reference", folder / "checkpoint")
    assert result.exit_code == 3
    assert "Traceback" not in result.stderr


def test_evaluate_an_engine_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = folder / "out" / "04-engine-sm86" / "model.engine"
    engine.parent.mkdir()
    engine.write_bytes(b"engine")
    engine.with_name("model.engine.json").write_text('{"runtime": "tensorrt-rtx"}')
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    result = evaluate(folder, engine)
    assert (result.exit_code, result.stdout) == (4, "")
    assert "no GPU" in result.stderr
    assert {".engine", ".plan", ".trt"} == evaluation.ENGINES


# ---------------------------------------------------------------------------------------------- report


def test_report_in_every_form(done: tuple[Path, Run]) -> None:
    folder = done[1].folder
    assert "PASS (exit 0)" in headwise_command("report", folder).stdout
    assert headwise_command("report", folder, "--markdown").stdout.strip() == (folder / "report.md").read_text().strip()
    assert headwise_command("report", folder, "--html").stdout.strip() == (folder / "report.html").read_text().strip()
    assert ElementTree.fromstring(headwise_command("report", folder, "--junit").stdout.encode()).tag == "testsuites"


def test_report_of_nothing(tmp_path: Path) -> None:
    result = headwise_command("report", tmp_path)
    assert result.exit_code == 2
    assert "no report.json in" in result.stderr
    (tmp_path / "report.json").write_text('{"schema": "other/1"}')
    assert headwise_command("report", tmp_path).exit_code == 2


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "headwise", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("headwise, version")
    assert headwise.__all__
