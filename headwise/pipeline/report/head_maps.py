"""What a pass did to the heads of every layer: for tables, and for the map of layers and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headwise.model.layout import AttentionLayout, Layout

Report = Mapping[str, Any]
Stage = Mapping[str, Any]

UNCHANGED = "unchanged"
_LEGENDS = {
    "share-kv": "number: the kv head that a query head reads",
    "cluster-heads": "number: the head whose attention weights are used",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMap:
    """The heads of every layer before and after one pass.

    Attributes:
        stage: the pass stage.
        score: name of the score that decided; empty where there was none.
        scores: per layer, original query head id -> score.
        before, after: per layer, original query head ids.
        uses: per layer, original query head id -> the head whose queries or keys it uses now, where that changed.
        changes: per layer, what the pass did to its heads, in words.
        legend: what the numbers of ``uses`` are; empty where there are none.
        columns: heads that the widest layer had when the run began.
        refit: layer -> relative error of its output on the calibration tokens, ``before`` and ``after`` the refit, and
            of its ``reconstruction``, where there was one, on the held-out tokens.
        twin_error: largest relative difference between the edited model and its exact twin.
        rolled_back: the gate said no and the pass was undone.
    """

    stage: str
    score: str
    scores: tuple[Mapping[int, float], ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    uses: tuple[Mapping[int, int], ...]
    changes: tuple[str, ...]
    legend: str
    columns: int
    refit: Mapping[int, Mapping[str, Any]]
    twin_error: float | None
    rolled_back: bool

    @property
    def reconstructed(self) -> bool:
        """Whether a layer was reconstructed."""
        return any("reconstruction" in fit for fit in self.refit.values())

    @property
    def removed(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the ids that the pass took away."""
        return tuple(tuple(h for h in old if h not in new) for old, new in zip(self.before, self.after, strict=True))


def head_maps(report: Report) -> list[HeadMap]:
    """One map per pass stage that is about heads; all have as many columns as the first one needs."""
    stages = [stage for stage in report["stages"] if "plan" in (stage.get("record") or {}) and _of_heads(stage)]
    first = Layout.from_json(stages[0]["record"]["before"]).attention if stages else ()
    columns = 1 + max((head for layer in first for head in layer.query), default=0)
    return [_head_map(stage, columns) for stage in stages]


def _of_heads(stage: Stage) -> bool:
    """Whether a pass has more to say than which neurons went."""
    edits = stage["record"]["plan"]["edits"]
    return not edits or any(edit["type"] != "drop-neurons" for edit in edits)


def _head_map(stage: Stage, columns: int) -> HeadMap:
    record = stage["record"]
    before, after = (Layout.from_json(record[when]).attention for when in ("before", "after"))
    scores = record["plan"].get("scores") or {"name": "", "layers": [{} for _ in before]}
    return HeadMap(
        stage=stage["name"],
        score=scores["name"],
        scores=tuple({int(h): float(v) for h, v in layer.items() if v is not None} for layer in scores["layers"]),
        before=tuple(layer.query for layer in before),
        after=tuple(layer.query for layer in after),
        uses=tuple(_uses(old, new) for old, new in zip(before, after, strict=True)),
        changes=tuple(describe(record["plan"], layer) for layer in range(len(before))),
        legend=next((_LEGENDS[e["type"]] for e in record["plan"]["edits"] if e["type"] in _LEGENDS), ""),
        columns=columns,
        refit={int(fit["layer"]): fit for fit in record.get("refit") or [] if fit.get("part") != "mlp"},
        twin_error=record.get("twin_error"),
        rolled_back=stage["status"] == "rolled-back",
    )


def describe(plan: Mapping[str, Any], layer: int) -> str:
    """The edits of one layer in words, by original ids, and what the plan notes about it."""
    edits = [edit for edit in plan["edits"] if edit["layer"] == layer and edit["type"] != "drop-neurons"]
    words = [_WORDS[edit["type"]](edit) for edit in edits if edit["type"] in _WORDS]
    text = "; ".join(filter(None, words)) or UNCHANGED
    note = plan.get("notes", {}).get(str(layer))
    return f"{text} ({note})" if note else text


def _dropped(edit: Mapping[str, Any]) -> str:
    return "removed " + ", ".join(map(str, edit["query"]))


def _shared(edit: Mapping[str, Any]) -> str:
    before, after = sum(map(len, edit["groups"])), len(edit["groups"])
    groups = ["+".join(map(str, group)) for group in edit["groups"]]
    return f"{before} kv heads become {after}: {', '.join(groups)}" if after < before else ""


def _clustered(edit: Mapping[str, Any]) -> str:
    clusters = [f"{first} for {'+'.join(map(str, rest))}" for first, *rest in edit["clusters"] if rest]
    return f"attention of {', '.join(clusters)}" if clusters else ""


def _clustered_online(edit: Mapping[str, Any]) -> str:
    return f"{edit['count']} clusters, formed by every sample"


def _latent(edit: Mapping[str, Any]) -> str:
    return f"keys and values from a latent of {edit['rank']} numbers per token"


def _shared_layers(edit: Mapping[str, Any]) -> str:
    what = f"latent of {edit['rank']} numbers per token" if edit["rank"] else "keys and values"
    return f"reads the {what} of layer {edit['owner']}"


def _kept_tokens(edit: Mapping[str, Any]) -> str:
    budget = edit["budget"]
    if budget["stream"]:
        left = {"drop": "the rest leaves", "fuse": "the rest becomes one", "merge": "the rest becomes part of them"}
        return f"{budget['keep']:.1%} of the tokens go on, {left[budget['rest']]}"
    whose = "the layer keeps the same" if budget["shared"] else "every head keeps its own"
    rest = "the rest as one" if budget["rest"] == "fuse" else "the rest goes"
    which = "a prompt's tokens" if budget.get("prompt") else "the tokens"
    return f"{whose} {budget['keep']:.1%} of {which}, {rest}"


def _streaming(edit: Mapping[str, Any]) -> str:
    windows = [f"kv head {head} the last {window}" for head, window in edit["windows"].items()]
    return f"{', '.join(windows)} tokens and the first {edit['sink']} only" if windows else ""


_WORDS = {
    "drop-heads": _dropped,
    "share-kv": _shared,
    "cluster-heads": _clustered,
    "cluster-online": _clustered_online,
    "latent-kv": _latent,
    "share-layers": _shared_layers,
    "keep-tokens": _kept_tokens,
    "stream-heads": _streaming,
}


def _uses(before: AttentionLayout, after: AttentionLayout) -> dict[int, int]:
    if after.represented != before.represented:
        pairs = zip(after.query, after.represented, strict=True)
        return {head: used for head, used in pairs if head != used}
    if len(after.kv) < len(before.kv) and len(after.query) == len(before.query):
        return {head: after.reads(head) for head in after.query}
    return {}
