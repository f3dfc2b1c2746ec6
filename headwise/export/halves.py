"""Whole texts through a decoder that keeps a share of every prompt: the first half is one, the rest goes on behind it.

So what is judged is what a text costs that is written behind a pruned prompt. In PyTorch the model does the same in one
call, see ``model/prompt_tokens.py``.

Shape letters: B batch, S tokens of a text, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headwise.export.onnx import Case, Parity, compare
from headwise.export.ports import IDS, MASK, POSITIONS
from headwise.export.stepping import Decoder, OrtDecoder, TorchDecoder
from headwise.model.cache import SHIFT, read_port
from headwise.model.decoder import positions
from headwise.model.forward import run, to_torch
from headwise.model.masks import HIDDEN
from headwise.model.view import ModelView

Array = NDArray[Any]


class Halves(NamedTuple):
    """Texts whose first halves end in the same column.

    Attributes:
        ids: (B, C), padded on both sides.
        seen: (B, C) 1 at tokens.
        width: columns of first halves.
        first: (B,) column of the first token.
    """

    ids: Array
    seen: Array
    width: int
    first: Array


def align(ids: Array, mask: Array) -> Halves:
    """Move the texts of a batch, (B, S), padded on whichever side, so that their halves begin together."""
    texts = [row[real == 1] for row, real in zip(ids, mask, strict=True)]
    halves = [(len(text) + 1) // 2 for text in texts]
    width, rest = max(halves), max(len(text) - half for text, half in zip(texts, halves, strict=True))
    tokens, seen = np.zeros((2, len(texts), width + rest), np.int64)
    first = width - np.array(halves)
    for row, (text, start) in enumerate(zip(texts, first, strict=True)):
        tokens[row, start : start + len(text)], seen[row, start : start + len(text)] = text, 1
    return Halves(ids=tokens, seen=seen, width=width, first=first)


def read_halves(decoder: Decoder, ids: Array, mask: Array) -> Array:
    """(B, S, V) scores behind every token of the texts; 0 at padding.

    Args:
        decoder: reads first halves as prompts padded on the left, and then one token of every text per call.
        ids: (B, S).
        mask: (B, S) 1 at tokens and 0 at padding, on whichever side that is.
    """
    tokens, seen, width, _ = align(ids, mask)
    decoder.begin(len(ids))
    found = [decoder(tokens[:, :width], seen[:, :width], positions(seen[:, :width], width))]
    for end in range(width + 1, tokens.shape[1] + 1):
        found.append(decoder(tokens[:, end - 1 : end], seen[:, :end], positions(seen[:, :end], 1)))
    scores = np.concatenate(found, axis=1)
    logits = np.zeros((*ids.shape, scores.shape[2]), scores.dtype)
    logits[mask == 1] = scores[seen == 1]
    return logits


def check_halves(
    view: ModelView, path: Path, ids: Array, tolerance: float, *, decode: Path | None = None
) -> tuple[Parity, ...]:
    """Compare a graph on ONNX Runtime with its module: logits with those of whole texts, caches with its own.

    Args:
        view: the model that was exported.
        path: the graph.
        ids: (B, S) tokens; rows but the first are padded on the left, then on the right.
        tolerance: largest absolute difference, relative to the largest output where that is above 1.
        decode: the graph that takes calls of one token, where there is one.

    Raises:
        ExportError: logits of real tokens, or what is cached of them, differ by more.
    """
    padding = np.minimum(np.arange(len(ids)), ids.shape[1] - 1)[:, None]
    column = np.arange(ids.shape[1])[None]
    left, right = (column >= padding).astype(np.int64), (column < ids.shape[1] - padding).astype(np.int64)
    cases = [("padded on the left", ids, left), ("padded on the right", ids, right), ("one row", ids[:1], left[:1])]
    found = []
    with OrtDecoder(path, decode=decode) as graph:
        for label, tokens, mask in cases:
            shape = f"{'x'.join(map(str, tokens.shape))} half of it a prompt, {label}"
            shape += "" if decode is None else ", by two graphs"
            whole = {IDS: tokens, MASK: mask, POSITIONS: positions(mask, tokens.shape[1])}
            with torch.no_grad():
                logits = next(iter(run(view.module, to_torch(whole)).values())).numpy()
            real = mask == 1
            actual = read_halves(graph, tokens, mask)
            found.append(compare(Case(output="logits", shape=shape), logits[real], actual[real], tolerance))
            parities = _compare_caches(view, graph, tokens, mask, Case(output="", shape=shape), tolerance)
            # Of what is cached, the worst says enough.
            found.append(max(parities, key=lambda parity: parity.max_abs))
    return tuple(found)


def _compare_caches(
    view: ModelView, graph: OrtDecoder, ids: Array, mask: Array, case: Case, tolerance: float
) -> list[Parity]:
    """What a graph that has read these texts holds, beside what the module holds behind the same calls."""
    reference = TorchDecoder(view)
    read_halves(reference, ids, mask)
    expected, actual = reference.cached(), graph.cached()
    shifts = {read_port(name)[0]: array for name, array in expected.items() if read_port(name)[1] == SHIFT}
    found = []
    for name, array in expected.items():
        shift = shifts.get(read_port(name)[0])
        real = align(ids, mask).seen == 1 if shift is None else shift[..., 0] > HIDDEN / 2
        known, other = (np.moveaxis(side, -2, 1)[real] for side in (array, actual[name]))
        found.append(compare(case._replace(output=name), known, other, tolerance))
    return found
