"""Heads put into the order in which they stream; part of surgery."""

from __future__ import annotations

from dataclasses import replace

import torch

from headwise.model.layout import AttentionLayout
from headwise.model.projections import Projections
from headwise.model.view import AttentionView
from headwise.model.window_edits import StreamHeads
from headwise.model.writing import write


def stream_heads(view: AttentionView, edit: StreamHeads) -> None:
    """Move whole groups of heads, in all four projections, so that heads with the same window are neighbours."""
    old, before, layout = view.read(), view.layout, edit.apply(view.layout)
    queries = [before.query.index(head) for head in layout.query]
    kvs = [before.kv.index(head) for head in layout.kv]
    new = Projections(
        query=old.query[queries],
        key=old.key[kvs],
        value=old.value[kvs],
        output=old.output[:, queries],
        query_bias=_pick(old.query_bias, queries),
        key_bias=_pick(old.key_bias, kvs),
        value_bias=_pick(old.value_bias, kvs),
        output_bias=old.output_bias,
        further={path: parts[queries] for path, parts in old.further.items()},
    )
    write(view, new, layout)


def in_place(layout: AttentionLayout, edit: StreamHeads) -> AttentionLayout:
    """The layout in which heads get their windows where they are, for the twin."""
    windows = tuple(edit.windows.get(head, 0) for head in layout.kv)
    found = replace(layout, windows=windows, sink=edit.sink, bidirectional=edit.bidirectional)
    return found if edit.windows else layout


def _pick(bias: torch.Tensor | None, heads: list[int]) -> torch.Tensor | None:
    return None if bias is None else bias[heads]
