"""`headwise generate`: the run of a small decoder, its graphs and its checkpoints continue texts alike."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from runs import STORY, finished

from headwise.calibration.data import DataSpec, Table
from headwise.calibration.tasks import LanguageOptions, make_task
from headwise.cli import main
from headwise.errors import DataError
from headwise.export.decoder import export_decode, export_model
from headwise.export.generate import generate
from headwise.export.precision import ExportSpec
from headwise.export.stepping import OrtDecoder
from headwise.model.checkpoint import load_checkpoint
from headwise.passes.base import Pass, run_pass
from headwise.passes.latent_kv import LatentKVPass
from headwise.passes.share_layers import ShareLayersPass
from headwise.pipeline.commands.evaluation import evaluate_artifact
from headwise.pipeline.commands.generation import Sampling, Writer, continue_prompts, open_writer
from headwise.pipeline.folders import compressed_model, runnable_graph
from headwise.pipeline.report.document import read_report

MODELS = os.environ.get("HEADWISE_MODELS", "")
TEXTS = {"t": "length", "e e f": "end", "a b c": "end", "k l": "end"}
"""Prompts, and how the texts of 12 tokens end that the small model makes of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: one pass, the graph, and an int8 graph for the CPU."""
    folder, run = finished("story", tmp_path_factory.getbasetemp())
    assert run.outcome == "pass", run.reason
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def as_json(*arguments: object) -> dict[str, Any]:
    given = [option for prompt in TEXTS for option in ("--prompt", prompt)]
    result = call(*arguments, *given, "--max-new-tokens", 12, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_configuration_beside_the_graphs_is_that_of_the_compressed_model(folder: Path) -> None:
    written = [folder / "out" / path / "config.json" for path in ("02-onnx", "03-cpu", "01-prune-heads/model")]
    assert len({path.read_bytes() for path in written}) == 1


def test_graph_and_model_of_a_run_give_the_same_texts(folder: Path) -> None:
    graph, model = as_json(folder / "out" / "02-onnx" / "model.onnx"), as_json(folder / "out", "--runtime", "torch")
    assert (graph["runtime"], model["runtime"]) == ("onnxruntime", "torch")
    assert Path(model["model"]) == folder / "out" / "01-prune-heads" / "model"
    assert graph["texts"] == model["texts"]
    assert {text["prompt"]: text["ended"] for text in graph["texts"]} == TEXTS
    checkpoint = load_checkpoint(model["model"])
    tokenizer, module = checkpoint.tokenizer(), checkpoint.module
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    made: Any = module.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12, pad_token_id=0
    )
    for text, row in zip(graph["texts"], made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        assert text["tokens"] == row[: row.index(2) if 2 in row else None]
        assert text["text"].split() == tokenizer.decode(text["tokens"], skip_special_tokens=True).split()


def test_a_run_is_continued_on_its_graph_for_the_cpu(folder: Path) -> None:
    found = as_json(folder / "out")
    assert Path(found["model"]) == folder / "out" / "03-cpu" / "model.onnx"
    assert found["runtime"] == "onnxruntime"
    assert [text["prompt_tokens"] for text in found["texts"]] == [2, 4, 4, 3]


def test_the_cache_of_the_run_holds_codes(folder: Path) -> None:
    """What was quantized on the way to the graph for the CPU is what the report, the graph and the decoder say."""
    report = read_report(folder / "out")
    stage = next(stage for stage in report["stages"] if stage["name"] == "cpu")
    assert (stage["record"]["kv"]["tensors"], stage["record"]["kv"]["per_channel"]) == (4, 4)
    assert stage["record"]["kv"]["cache"]
    decoder = OrtDecoder(runnable_graph(folder / "out", report))
    decoder(np.array([[1, 5, 6]]), np.ones((1, 3), int), np.arange(3)[None])
    cached = decoder.cached()
    assert {array.dtype for array in cached.values()} == {np.dtype(np.int8)}
    assert sum(array.nbytes for array in cached.values()) == 3 * stage["cost"]["kv_bytes_per_token"]


def test_where_onnxruntime_cannot_join_codes_the_graph_beside_it_is_run(folder: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "decoded.onnx"):
        (tmp_path / name).write_bytes((folder / "out" / "02-onnx" / "model.onnx").read_bytes())
    writer = open_writer(str(tmp_path / "model.onnx"), tokenizer=str(folder / "checkpoint"))
    assert writer.model == str(tmp_path / "decoded.onnx")


def test_one_prompt_streams_and_several_are_printed_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    graph = folder / "out" / "02-onnx" / "model.onnx"
    texts = {text["prompt"]: text["prompt"] + text["text"] for text in as_json(graph)["texts"]}
    one = call(graph, "--prompt", "t", "--max-new-tokens", 12)
    assert (one.exit_code, one.stdout) == (0, texts["t"] + "\n")
    (tmp_path / "prompts.txt").write_text("e e f\n\nk l\n")
    several = call(graph, "--prompt", "t", "--prompts-file", tmp_path / "prompts.txt", "--max-new-tokens", 12)
    assert several.stdout == "\n\n".join(texts[prompt] for prompt in ("t", "e e f", "k l")) + "\n"


class Scripted:
    """A decoder that writes given tokens."""

    name = "scripted"
    prunes = False

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = iter(tokens)

    def begin(self, rows: int) -> None:
        assert rows == 1

    def __call__(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        del mask, positions
        scores = np.zeros((*ids.shape, 300), np.float32)
        scores[0, -1, next(self.tokens)] = 1
        return scores


class Bytes:
    """A tokenizer whose tokens are bytes."""

    pad_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_character_is_said_when_all_its_tokens_are_there() -> None:
    tokens = list("né €!".encode())
    writer = Writer(decoder=Scripted(tokens), tokenizer=Bytes(), model="", ends=frozenset({299}), longest=None)
    said: list[str] = []
    found = continue_prompts(writer, ["x"], new_tokens=len(tokens), say=said.append)
    assert said == ["n", "é", " ", "€", "!"]
    assert found["texts"][0]["text"] == "né €!"
    said.clear()
    writer = Writer(decoder=Scripted(tokens), tokenizer=Bytes(), model="", ends=frozenset(), longest=None)
    continue_prompts(writer, ["x"], new_tokens=2, say=said.append)
    assert said == ["n", "\N{REPLACEMENT CHARACTER}"]


def test_drawn_texts_are_the_same_for_the_same_seed(folder: Path) -> None:
    graph = folder / "out" / "02-onnx" / "model.onnx"
    drawn = [as_json(graph, "--temperature", 1.5, "--top-k", 8, "--seed", seed)["texts"] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    result = call(graph, "--prompt", "t", "--top-k", 8)
    assert (result.exit_code, "top-k is 8, but at temperature 0 nothing is drawn" in result.stderr) == (2, True)
    assert Sampling(temperature=1.0, top_k=3).choose()(0, np.array([0.0, 9.0, 0.0])) == 1


def test_what_cannot_be_continued_says_why(folder: Path, tmp_path: Path) -> None:
    graph = folder / "out" / "02-onnx" / "model.onnx"
    lone = tmp_path / "model.onnx"
    lone.write_bytes(graph.read_bytes())
    (tmp_path / "empty").mkdir()
    prompt = ("--prompt", "t")
    for arguments, message in (
        ((graph,), "there is no prompt"),
        ((graph, "--prompts-file", tmp_path / "none.txt"), "none.txt cannot be read"),
        ((lone, *prompt), "no tokenizer: .*model.onnx does not say which checkpoint it came from"),
        ((lone, *prompt, "--tokenizer", tmp_path / "empty"), "no tokenizer in .*empty"),
        ((tmp_path / "no.onnx", *prompt), "no.onnx does not exist"),
        ((graph, *prompt, "--runtime", "torch"), "model.onnx is a graph, and torch runs checkpoints"),
        ((folder / "checkpoint", *prompt, "--runtime", "ort"), "is no run and no graph"),
        (("conftest:two_heads", *prompt), "cannot continue a text, because TwoHeads does not generate text"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert re.search(message, result.stderr), result.stderr
    assert call(lone, *prompt, "--tokenizer", folder / "checkpoint", "--max-new-tokens", 3).exit_code == 0


def test_a_run_without_a_passed_graph_or_pass(folder: Path) -> None:
    report = read_report(folder / "out")
    stages = [{**stage, "status": "rolled-back" if stage["kind"] == "pass" else "failed"} for stage in report["stages"]]
    broken = {**report, "stages": stages}
    assert compressed_model(folder / "out", broken) == str((folder / "checkpoint").resolve())
    with pytest.raises(DataError, match="holds no graph that passed its gate"):
        runnable_graph(folder / "out", broken)


def test_evaluate_feeds_a_graph_with_a_cache(folder: Path) -> None:
    found = evaluate_artifact(str(folder / "out" / "02-onnx" / "model.onnx"), str(folder / "recipe.yaml"))
    stage = read_report(folder / "out")["stages"][2]
    assert found["metrics"][0]["value"] == pytest.approx(stage["metrics"][0]["value"], abs=1e-6)
    assert STORY["task"]["type"] == "language-modeling"


STORIES: tuple[Pass | None, ...] = (
    None,
    LatentKVPass(rank=12, rotary=4, refit=False),
    LatentKVPass(rank=16, route="rebuild", refit=False),
    ShareLayersPass(rank=32, refit=False),
    ShareLayersPass(how="mean", refit=False),
)


@pytest.mark.skipif(
    not (Path(MODELS) / "stories260k").is_dir(), reason="HEADWISE_MODELS names no folder with the model stories260k"
)
@pytest.mark.parametrize("pass_", STORIES, ids=str)
def test_a_trained_model_tells_the_stories_that_torch_tells(pass_: Pass | None, tmp_path: Path) -> None:
    source = str(Path(MODELS) / "stories260k")
    checkpoint = load_checkpoint(source)
    view = checkpoint.view()
    prompts = ["Once upon a time", "Lily", "The big dog was very", "One day, a girl named Lily went to the park with"]
    options = LanguageOptions(type="language-modeling", data=DataSpec(path="unread.txt", format="text"))
    task = make_task(options)
    examples = task.encode(Table(columns={"text": prompts}, digest="", source="prompts"), checkpoint)
    if pass_ is not None:
        run_pass(pass_, view, load_checkpoint(source).view(), task, examples)
    export_model(view, examples, tmp_path / "model.onnx", ExportSpec())
    found_two = export_decode(view, examples, tmp_path / "model.onnx", ExportSpec()) is not None
    assert found_two == (pass_ == STORIES[1])
    writer = open_writer(str(tmp_path / "model.onnx"), tokenizer=source)
    ids = [writer.tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, ids))
    padded, mask = (
        torch.tensor([[fill] * (width - len(row)) + [one or token for token in row] for row in ids])
        for fill, one in ((0, 0), (0, 1))
    )
    module: Any = view.module
    given = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = module.generate(padded, attention_mask=mask, **given)[:, width:].tolist()
    assert isinstance(writer.decoder, OrtDecoder)
    found = generate(writer.decoder, ids, new_tokens=200, batch=4)
    assert [text.tokens for text in found] == expected
