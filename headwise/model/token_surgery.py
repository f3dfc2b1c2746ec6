"""Join the layers of a model that tell each other something about tokens, as their layouts say."""

from __future__ import annotations

from headwise.model.token_flow import Flow, join
from headwise.model.token_tally import take_turns
from headwise.model.view import ModelView


def let_leave(model: ModelView, kind: type[Flow] = Flow) -> None:
    """Give the layers of a model one flow where tokens leave behind some of them, and none where they do not.

    Layers whose tokens stay, but are worth what earlier layers say, get one sum of that.
    """
    budgets = {
        layer.index: layer.layout.tokens
        for layer in model.attention
        if layer.layout.tokens is not None and layer.layout.tokens.stream
    }
    flow = kind(budgets, last=len(model.attention) - 1) if budgets else None
    for layer in model.attention:
        join(flow, layer.index, layer.caller, layer.block)
    budgeted = [layer.layout.tokens for layer in model.attention]
    wanted = [b is not None and b.score == "accumulated" and not b.stream for b in budgeted]
    take_turns([layer.caller for layer in model.attention], wanted)
