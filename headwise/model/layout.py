"""Which heads and neurons every layer has. Pure data: no tensors, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from headwise.model.cache import SHIFT, CacheLayout, CacheTensor
from headwise.model.token_budget import TokenBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayout:
    """The heads of one attention layer, by their ids in the original checkpoint.

    Heads are listed in storage order. Query heads are grouped: with ``n`` query and ``k`` kv heads, the query head at
    position ``i`` reads the kv head at position ``i // (n // k)`` (multi-head attention is ``n == k``, grouped-query
    attention ``n > k``, multi-query attention ``k == 1``).

    In a clustered layer (arXiv 2403.08058) some heads use the attention weights of another head, their representative.
    Only representatives have queries, and only the kv heads that representatives read have keys; values are all there.

    In a latent layer (arXiv 2502.07864) keys and values of all heads are computed from a few numbers per token, the
    latent. A layer with an owner has no such numbers, keys or values of its own: it reads those of an earlier layer.

    In a streaming layer (arXiv 2410.10819) the readers of some kv heads see the first tokens and the last ones only.

    Attributes:
        query: original ids of the query heads that are left.
        kv: original ids of the key/value heads that are left.
        head_dim: width of one head.
        represented: for every query head the id of its representative; empty where each head has its own weights.
        online: clusters that every sample forms for itself from its first tokens; 0 where it does not. All queries and
            keys are there, because any head may become a representative.
        latent: numbers per token that keys and values are computed from; 0 where they are projected from the layer's
            input.
        rotary: numbers per token of rotary keys beside the latent, of all ``rotary_heads`` together.
        rotary_heads: 1 where all heads share one rotary key, or one per kv head.
        unrotated: width of the part of every query that meets keys from the latent; 0 where the class of the original
            runs the layer, whose queries are as they were. Without rotary keys beside the latent, rotary positions turn
            the keys that come from it.
        owner: the layer whose latent, or whose keys and values, this one reads; None where it has its own.
        tokens: which tokens every head keeps (arXiv 2502.14504); None where queries meet the keys of all.
        windows: for every kv head how many of the last tokens its readers see, their own included, and 0 where they
            see all; empty where all heads see all. Heads of one window are neighbours, those that see all come first.
        sink: first tokens of a text that heads with a window see as well.
        bidirectional: heads with a window see as many of the next tokens as of the last ones (arXiv 2004.05150).
    """

    query: tuple[int, ...]
    kv: tuple[int, ...]
    head_dim: int
    represented: tuple[int, ...] = ()
    online: int = 0
    latent: int = 0
    rotary: int = 0
    rotary_heads: int = 1
    unrotated: int = 0
    owner: int | None = None
    tokens: TokenBudget | None = None
    windows: tuple[int, ...] = ()
    sink: int = 0
    bidirectional: bool = False

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return len(self.query) // len(self.kv)

    @property
    def clustered(self) -> bool:
        """Whether some heads use the attention weights of another one."""
        return bool(self.represented) or self.online > 0

    @property
    def custom(self) -> bool:
        """Whether only headwise's attention function computes what the layer does."""
        return self.clustered or self.streaming or self.tokens is not None

    @property
    def compressed(self) -> bool:
        """Whether keys and values come from a latent, or from another layer."""
        return self.latent > 0 or self.owner is not None

    @property
    def streaming(self) -> bool:
        """Whether some heads see the first tokens and the last ones only."""
        return bool(self.windows)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(window, kv heads) of neighbours with the same window, in storage order."""
        return tuple((window, len(list(heads))) for window, heads in groupby(self.windows or (0,) * len(self.kv)))

    @property
    def scoring(self) -> tuple[int, ...]:
        """Ids of the query heads that have queries of their own, in storage order."""
        return tuple(head for head in self.query if head in self.represented) if self.represented else self.query

    @property
    def keyed(self) -> tuple[int, ...]:
        """Ids of the kv heads that have keys, in storage order."""
        read = {self.reads(head) for head in self.scoring}
        return tuple(head for head in self.kv if head in read)

    def reads(self, query: int) -> int:
        """Id of the kv head that a query head reads."""
        return self.kv[self.query.index(query) // self.group]

    @property
    def cached_latent(self) -> bool:
        """Whether the layer runs ``LatentAttention``, which caches the latent itself."""
        return self.owner is None and (self.unrotated > 0 or self.rotary > 0)

    @property
    def cached(self) -> tuple[CacheTensor, ...]:
        """What a kv cache holds of this layer; classes of transformers keep keys and values of all heads."""
        if self.owner is not None:
            return ()
        if self.cached_latent:
            latent = CacheTensor(name="latent", shape=(1, self.latent))
            shape = (self.rotary_heads, self.rotary // self.rotary_heads)
            rotary = CacheTensor(name="rotary_key", shape=shape)
            return (latent, rotary) if self.rotary else (latent,)
        if self.streaming:
            return tuple(
                CacheTensor(
                    name=f"window{window}_{name}" if window else name,
                    shape=(heads, self.head_dim),
                    longest=self.sink + window if window else None,
                )
                for window, heads in self.blocks
                for name in ("key", "value")
            )
        budget = self.tokens if self.tokens is not None and self.tokens.prompt else None
        found = (
            CacheTensor(name="key", shape=(len(self.keyed), self.head_dim), budget=budget),
            CacheTensor(name="value", shape=(len(self.kv), self.head_dim), budget=budget),
        )
        return found if budget is None else (*found, CacheTensor(name=SHIFT, shape=(1,), budget=budget))

    @property
    def kv_width(self) -> int:
        """Numbers per token from which this layer has its keys and values, without those of heads with a window."""
        if self.compressed:
            return self.latent + self.rotary if self.owner is None else 0
        return sum(tensor.numbers for tensor in self.cached if tensor.longest is None)

    def units(self) -> tuple[tuple[int, ...], ...]:
        """The smallest sets of query heads that can go: single heads (MHA) or all readers of a kv head (GQA)."""
        size = self.group
        return tuple(self.query[start : start + size] for start in range(0, len(self.query), size))

    def without(self, query: Sequence[int]) -> AttentionLayout:
        """The layout after removing these query heads; a kv head that nobody reads any more goes too."""
        gone = set(query)
        size = self.group
        kept_query = tuple(head for head in self.query if head not in gone)
        readers = [self.query[i * size : (i + 1) * size] for i in range(len(self.kv))]
        kept_kv = tuple(kv for kv, heads in zip(self.kv, readers, strict=True) if not gone.issuperset(heads))
        return replace(self, query=kept_query, kv=kept_kv)

    def to_json(self) -> dict[str, Any]:
        data = {"query": list(self.query), "kv": list(self.kv), "head_dim": self.head_dim}
        represented = {"represented": list(self.represented)} if self.represented else {}
        plain = AttentionLayout(query=(), kv=(), head_dim=0)
        names = ("latent", "rotary", "rotary_heads", "unrotated")
        latent = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}
        owner = {} if self.owner is None else {"owner": self.owner}
        windows = {"windows": list(self.windows), "sink": self.sink} if self.windows else {}
        windows |= {"bidirectional": True} if self.bidirectional else {}
        tokens = {} if self.tokens is None else {"tokens": self.tokens.to_json()}
        online = {"online": self.online} if self.online else {}
        return data | represented | online | latent | owner | windows | tokens

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionLayout:
        return cls(
            query=tuple(data["query"]),
            kv=tuple(data["kv"]),
            head_dim=int(data["head_dim"]),
            represented=tuple(data.get("represented", ())),
            online=int(data.get("online", 0)),
            latent=int(data.get("latent", 0)),
            rotary=int(data.get("rotary", 0)),
            rotary_heads=int(data.get("rotary_heads", 1)),
            unrotated=int(data.get("unrotated", 0)),
            owner=data.get("owner"),
            tokens=TokenBudget.from_json(data["tokens"]) if "tokens" in data else None,
            windows=tuple(data.get("windows", ())),
            sink=int(data.get("sink", 0)),
            bidirectional=bool(data.get("bidirectional", False)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpLayout:
    """The neurons of one MLP, by their ids in the original checkpoint.

    Attributes:
        neurons: original ids of the neurons that are left, in storage order.
        width: neurons that the original checkpoint had.
    """

    neurons: tuple[int, ...]
    width: int

    def without(self, neurons: Sequence[int]) -> MlpLayout:
        """The layout after removing these neurons."""
        gone = set(neurons)
        return replace(self, neurons=tuple(neuron for neuron in self.neurons if neuron not in gone))

    def to_json(self) -> dict[str, Any]:
        return {"width": self.width, "neurons": ranges(self.neurons)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MlpLayout:
        return cls(neurons=from_ranges(data["neurons"]), width=int(data["width"]))


def ranges(ids: Sequence[int]) -> str:
    """``(0, 1, 2, 5, 7, 8)`` as ``"0-2 5 7-8"``: an MLP has thousands of neurons, of which most are neighbours."""
    runs: list[list[int]] = []
    for identity in ids:
        if runs and identity == runs[-1][1] + 1:
            runs[-1][1] = identity
        else:
            runs.append([identity, identity])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str) -> tuple[int, ...]:
    """What ``ranges`` wrote."""
    ends = [(first, last or first) for first, _, last in (run.partition("-") for run in text.split())]
    return tuple(identity for first, last in ends for identity in range(int(first), int(last) + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What every layer of a model has left.

    Attributes:
        attention: one entry per attention layer, in the order of ``ModelView.attention``.
        mlp: one entry per MLP, in the order of ``ModelView.mlp``.
    """

    attention: tuple[AttentionLayout, ...]
    mlp: tuple[MlpLayout, ...] = ()

    @property
    def cache(self) -> CacheLayout:
        """What all attention layers cache."""
        return CacheLayout(layers=tuple(layer.cached for layer in self.attention))

    def to_json(self) -> dict[str, Any]:
        return {
            "attention": [layer.to_json() for layer in self.attention],
            "mlp": [layer.to_json() for layer in self.mlp],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Layout:
        """What ``to_json`` wrote, or the bare list of attention layers that version 0.1.0 saved."""
        if not isinstance(data, Mapping):
            data = {"attention": data, "mlp": ()}
        return cls(
            attention=tuple(AttentionLayout.from_json(entry) for entry in data["attention"]),
            mlp=tuple(MlpLayout.from_json(entry) for entry in data["mlp"]),
        )


def uniform(layers: Sequence[AttentionLayout]) -> bool:
    """Whether all layers have the same head counts and widths, and every head its own weights, on all tokens."""
    shapes = {(len(layer.query), len(layer.kv), layer.head_dim) for layer in layers}
    return len(shapes) <= 1 and not any(layer.custom or layer.compressed for layer in layers)
