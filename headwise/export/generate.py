"""Text from a decoder: prompts are read in batches padded on the left, then one token per row and call is chosen.

Shape letters: B batch, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwise.errors import DataError
from headwise.export.stepping import Decoder
from headwise.model.decoder import positions

Array = NDArray[Any]
Choose = Callable[[int, Array], int]
"""Number of a prompt and the (V,) scores of its next token -> that token."""
See = Callable[[int, int], None]
"""Called with the number of a prompt and every new token of it."""

PART = 512
"""Tokens of a prompt that are read by one call: scores of all of them are computed, which takes V floats for each.
Decoders that keep a share of a prompt read all of it at once."""


@dataclass(slots=True, kw_only=True)
class Continuation:
    """What a decoder made of a prompt.

    Attributes:
        tokens: the new ones, without the token that ended them.
        ended: ``end`` (the model said so), ``length`` (as many as were asked for) or ``context`` (the model takes no
            more).
    """

    tokens: list[int] = field(default_factory=list)
    ended: Literal["end", "length", "context"] = "length"


def likeliest(prompt: int, scores: Array) -> int:
    """The token with the highest score."""
    del prompt
    return int(scores.argmax())


def sampled(temperature: float, top_k: int | None = None, seed: int = 0) -> Choose:
    """Tokens drawn by their probability, for every prompt from a stream of its own, whatever else is in its batch.

    Args:
        temperature: above 0; scores are divided by it.
        top_k: how many of the likeliest tokens can be drawn; None for all.
        seed: of the draws.
    """
    streams: dict[int, np.random.Generator] = {}

    def choose(prompt: int, scores: Array) -> int:
        stream = streams.setdefault(prompt, np.random.default_rng([seed, prompt]))
        order = np.argsort(-scores, kind="stable")[:top_k]
        scaled = scores[order].astype(np.float64) / temperature
        weights = np.exp(scaled - scaled.max())
        return int(stream.choice(order, p=weights / weights.sum()))

    return choose


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    ends: Collection[int] = (),
    pad: int = 0,
    batch: int = 8,
    longest: int | None = None,
    choose: Choose = likeliest,
    see: See | None = None,
) -> list[Continuation]:
    """Continue every prompt.

    Args:
        decoder: the model.
        prompts: token ids, at least one each.
        new_tokens: most tokens to add to a prompt.
        ends: tokens that end a text.
        pad: token that fills up shorter prompts; nothing looks at it.
        batch: prompts that are continued together.
        longest: tokens that the model takes, prompt included; None for any number.
        choose: see ``likeliest`` and ``sampled``.
        see: told of every token.

    Raises:
        DataError: a prompt has no token, or more than the model takes.
    """
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= (longest or len(prompt)):
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens",
                expected="at least 1"
                + (f" and at most {longest}, which is all that the model takes" if longest else ""),
                fix="shorten the prompt" if prompt else "write something, or take a tokenizer that begins every text",
            )
    rules = _Rules(new_tokens, ends, longest, choose, see)
    found = [Continuation() for _ in prompts]
    for start in range(0, len(prompts), batch):
        numbers = range(start, min(start + batch, len(prompts)))
        _continue(decoder, [prompts[number] for number in numbers], pad, numbers, found, rules)
    return found


@dataclass(frozen=True, slots=True)
class _Rules:
    """When a text goes on, and how."""

    new_tokens: int
    ends: Collection[int]
    longest: int | None
    choose: Choose
    see: See | None

    def add(self, number: int, before: int, text: Continuation, scores: Array) -> bool:
        """Add the next token to a text of prompt ``number`` with ``before`` tokens; whether it goes on."""
        token = self.choose(number, scores)
        if token in self.ends:
            text.ended = "end"
            return False
        text.tokens.append(token)
        if self.see is not None:
            self.see(number, token)
        if self.longest is not None and before + len(text.tokens) > self.longest:
            text.ended = "context"
            return False
        return len(text.tokens) < self.new_tokens


def _continue(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    pad: int,
    numbers: Sequence[int],
    found: Sequence[Continuation],
    rules: _Rules,
) -> None:
    """Continue the prompts of one batch; a row that has ended runs on until all have, and nobody looks at it."""
    width = max(map(len, prompts))
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
    ids = np.full_like(mask, pad)
    ids[mask == 1] = np.concatenate(prompts)
    decoder.begin(len(prompts))
    size = width if decoder.prunes else PART
    for start in range(0, width, size):
        part, seen = ids[:, start : start + size], mask[:, : start + size]
        scores = decoder(part, seen, positions(seen, part.shape[1]))[:, -1]
    running = list(range(len(prompts)))
    while True:
        texts = [found[number] for number in numbers]
        running = [row for row in running if rules.add(numbers[row], len(prompts[row]), texts[row], scores[row])]
        if not running:
            return
        chosen = np.full((len(prompts), 1), pad, np.int64)
        chosen[running, 0] = [texts[row].tokens[-1] for row in running]
        mask = np.concatenate([mask, np.ones_like(chosen)], axis=1)
        scores = decoder(chosen, mask, positions(mask, 1))[:, -1]
