"""Continue prompts with a run, a graph or a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers

from headwise.errors import DataError
from headwise.export.decoder import DECODE
from headwise.export.generate import Choose, generate, likeliest, sampled
from headwise.export.stepping import Decoder, OrtDecoder, TorchDecoder
from headwise.model.checkpoint import load_checkpoint, read_tokenizer
from headwise.model.decoder import why_no_cache
from headwise.model.families import FAMILIES
from headwise.model.sources import quietly
from headwise.pipeline.folders import compressed_model, is_run, runnable_graph, untouched_model
from headwise.pipeline.graphs import judged
from headwise.pipeline.report.document import read_report
from headwise.pipeline.report.summary import Report

Runtime = Literal["ort", "torch"]
Say = Callable[[str], None]
"""Called with a piece of text as soon as it cannot change any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A decoder with what turns text into tokens and back.

    Attributes:
        decoder: on one of the runtimes.
        tokenizer: of transformers.
        model: the file or folder that runs.
        ends: tokens that end a text.
        longest: tokens that the model takes; None where nothing says.
    """

    decoder: Decoder
    tokenizer: Any
    model: str
    ends: frozenset[int]
    longest: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest; above, tokens are drawn.
        top_k: how many of the likeliest can be drawn.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def choose(self) -> Choose:
        """The choice as a function.

        Raises:
            DataError: tokens would not be drawn, but some are to be left out.
        """
        if self.top_k is not None and self.temperature == 0:
            raise DataError(
                f"top-k is {self.top_k}, but at temperature 0 nothing is drawn",
                expected="a temperature above 0, or no top-k",
                fix="add --temperature 1",
            )
        return sampled(self.temperature, self.top_k, self.seed) if self.temperature > 0 else likeliest


def open_writer(artifact: str, *, runtime: Runtime | None = None, tokenizer: str | None = None) -> Writer:
    """Find the model and its tokenizer.

    Args:
        artifact: the folder of a run, an ONNX file, or a checkpoint.
        runtime: ``ort`` or ``torch``; by default what the artifact is for: graphs run on ONNX Runtime.
        tokenizer: a directory or hub id; by default that of the checkpoint behind the artifact.

    Raises:
        DataError: there is no such graph or tokenizer, or the model does not continue texts.
    """
    path = Path(artifact)
    graph = path if path.suffix == ".onnx" else None
    run = path if graph is None else path.resolve().parent.parent
    report = read_report(run) if is_run(run) else None
    if graph is not None and runtime == "torch":
        raise DataError(
            f"{artifact} is a graph, and torch runs checkpoints",
            expected="--runtime ort, or the run or the checkpoint that the graph was made from",
            fix="leave --runtime out",
        )
    if graph is None and report is None and runtime == "ort":
        raise DataError(
            f"{artifact} is no run and no graph, and ONNX Runtime runs graphs",
            expected="the --out folder of headwise compress, or a file model.onnx",
            fix="compress it first, or use --runtime torch",
        )
    home = tokenizer if tokenizer or report is None else _tokenizer_of(report)
    if graph is not None:
        return _on_onnxruntime(graph, home)
    if report is not None and runtime != "torch":
        return _on_onnxruntime(runnable_graph(run, report), home)
    return _on_torch(artifact if report is None else compressed_model(run, report), home)


def _tokenizer_of(report: Report) -> str:
    return str(report["recipe"]["task"].get("processor") or untouched_model(report))


def continue_prompts(
    writer: Writer,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    batch: int = 8,
    sampling: Sampling | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Continue every prompt; plain data.

    Args:
        writer: see ``open_writer``.
        prompts: texts.
        new_tokens: most tokens to add to each.
        batch: prompts that are continued together.
        sampling: by default the likeliest token is taken.
        say: gets the text of a single prompt piece by piece.

    Raises:
        DataError: no prompt, or one that the model cannot read.
    """
    if not prompts:
        raise DataError("there is no prompt", expected="at least one", fix="give --prompt TEXT or --prompts-file FILE")
    ids = [writer.tokenizer(prompt)["input_ids"] for prompt in prompts]
    sampling = sampling or Sampling()
    pieces = _Pieces(writer.tokenizer, ids[0], say) if say is not None else None
    start = time.perf_counter()
    found = generate(
        writer.decoder,
        ids,
        new_tokens=new_tokens,
        ends=writer.ends,
        pad=writer.tokenizer.pad_token_id or 0,
        batch=batch,
        longest=writer.longest,
        choose=sampling.choose(),
        see=None if pieces is None else lambda _, token: pieces.add(token),
    )
    seconds = time.perf_counter() - start
    if pieces is not None:
        pieces.end()
    texts = [
        {
            "prompt": prompt,
            "text": _behind(writer.tokenizer, before, text.tokens),
            "tokens": text.tokens,
            "prompt_tokens": len(before),
            "ended": text.ended,
        }
        for prompt, before, text in zip(prompts, ids, found, strict=True)
    ]
    return {
        "model": writer.model,
        "runtime": writer.decoder.name,
        "texts": texts,
        "seconds": seconds,
        "tokens_per_second": sum(len(text.tokens) for text in found) / seconds,
    }


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", expected="a text file with one prompt per line", fix="check the path"
        ) from error


def _on_onnxruntime(graph: Path, home: str | None) -> Writer:
    if not graph.exists():
        raise DataError(f"{graph} does not exist", expected="a graph", fix="check the path")
    # Where ONNX Runtime cannot join the codes of a cache, the stage has the same graph with numbers beside it.
    graph, decode = judged(graph), judged(graph.with_name(DECODE))
    decoder = OrtDecoder(graph, decode=decode if decode != graph and decode.exists() else None)
    if home is None:
        raise DataError(
            f"no tokenizer: {graph} does not say which checkpoint it came from",
            expected="a graph inside the folder of a run, or --tokenizer",
            fix="add --tokenizer CHECKPOINT",
        )
    with quietly():
        return _writer(decoder, home, str(graph))


def _on_torch(source: str, home: str | None) -> Writer:
    checkpoint = load_checkpoint(source)
    view = checkpoint.view()
    refusal = why_no_cache(view)
    if refusal:
        raise DataError(
            f"{source} cannot continue a text, because {refusal}",
            expected="a causal language model whose layers cache keys and values",
            fix="name the checkpoint of such a model; `headwise inspect` shows what this one is",
        )
    return _writer(TorchDecoder(view), home or source, source)


def _writer(decoder: Decoder, home: str, model: str) -> Writer:
    tokenizer, reason = read_tokenizer(home)
    if tokenizer is None:
        raise DataError(
            f"no tokenizer in {home}: {reason}",
            expected="a tokenizer: prompts are text",
            fix="add --tokenizer with a directory that has one",
        )
    config: Any = None
    ends: Any = None
    # A folder with nothing but a tokenizer is enough.
    with suppress(OSError, ValueError):
        config = transformers.AutoConfig.from_pretrained(home)
        ends = transformers.GenerationConfig.from_model_config(config).eos_token_id
    with suppress(OSError, ValueError):
        ends = transformers.GenerationConfig.from_pretrained(home).eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return Writer(
        decoder=decoder,
        tokenizer=tokenizer,
        model=model,
        ends=frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends),
        longest=None if family is None else family.longest_sequence(config),
    )


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _behind(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of new tokens, with the space that may stand between them and the prompt."""
    return _decode(tokenizer, [*before, *tokens])[len(_decode(tokenizer, before)) :]


class _Pieces:
    """Says the text of tokens as they come; a character may take several tokens."""

    def __init__(self, tokenizer: Any, before: Sequence[int], say: Say) -> None:
        self._tokenizer, self._before, self._say = tokenizer, before, say
        self._tokens: list[int] = []
        self._said = 0

    def add(self, token: int) -> None:
        self._tokens.append(token)
        text = _behind(self._tokenizer, self._before, self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._emit(text)

    def end(self) -> None:
        self._emit(_behind(self._tokenizer, self._before, self._tokens))

    def _emit(self, text: str) -> None:
        if len(text) > self._said:
            self._say(text[self._said :])
            self._said = len(text)
