"""Heads put into the order in which they stream; part of surgery."""

from __future__ import annotations

from dataclasses import replace

from headwise.model.layout import AttentionLayout
from headwise.model.view import AttentionView
from headwise.model.window_edits import StreamHeads
from headwise.model.writing import write


def stream_heads(view: AttentionView, edit: StreamHeads) -> None:
    """Move whole groups of heads, in all four projections, so that heads with the same window are neighbours."""
    before, layout = view.layout, edit.apply(view.layout)
    queries = [before.query.index(head) for head in layout.query]
    kvs = [before.kv.index(head) for head in layout.kv]
    write(view, view.read().of(queries, kvs), layout)


def in_place(layout: AttentionLayout, edit: StreamHeads) -> AttentionLayout:
    """The layout in which heads get their windows where they are, for the twin."""
    windows = tuple(edit.windows.get(head, 0) for head in layout.kv)
    found = replace(layout, windows=windows, sink=edit.sink, bidirectional=edit.bidirectional)
    return found if edit.windows else layout
