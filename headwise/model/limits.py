"""What a model cannot have done to it, or only in part: said by the fields of its family records."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from headwise.model.access import attribute
from headwise.model.grouped import GroupedAttention
from headwise.model.saving import stock_entries
from headwise.model.view import AttentionView, ModelView


def limits(view: ModelView) -> tuple[str, ...]:
    """One sentence per limit, with the layers that it holds for where that is not all of them."""
    layers: dict[str, list[int]] = {}
    for layer in view.attention:
        for text in (*_refused(layer), *_sharing(layer), *_tokens(layer), *_attention(layer)):
            layers.setdefault(text, []).append(layer.index)
    found = [
        text if len(where) == len(view.attention) else f"{text} (layers {', '.join(map(str, where))})"
        for text, where in layers.items()
    ]
    if isinstance(view.module, PreTrainedModel) and not stock_entries(view):
        found.append(
            "saving: the stock config cannot say that a model has fewer heads of the same width; "
            "with fewer heads it loads through headwise only"
        )
    return tuple(found)


def _refused(layer: AttentionView) -> Iterator[str]:
    """Passes that would not be right here."""
    for name, reason in layer.family.refuses.items():
        yield f"{name}: refused, because {reason}"
    reason = why_not_streaming(layer)
    if reason:
        yield f"stream-heads: refused, because {reason}"


def why_not_streaming(layer: AttentionView) -> str:
    """Why no head of a layer can be given a window, as a clause behind "because"; empty where one can."""
    family = layer.family
    if not (layer.caches or family.bidirectional):
        return "windows are known for decoders without an encoder, and for encoders that need a mask of padding only"
    return _bounded(layer)


def why_not_pruned(layer: AttentionView) -> str:
    """Why no head of a layer can keep a share of the tokens, as a clause behind "because"; empty where one can."""
    if not layer.family.causal:
        return ""
    if not layer.caches:
        return "prompts, of which heads keep a share, are known for decoders without an encoder"
    return _bounded(layer)


def _bounded(layer: AttentionView) -> str:
    """Why attention to some of the earlier tokens is not what a layer can compute."""
    family = layer.family
    if family.window and attribute(layer.module, family.window) is not None:
        return "its heads see the last tokens only already"
    if family.soft_cap and attribute(layer.module, family.soft_cap) is not None:
        return "its scores are capped, which needs the weights of all tokens"
    return ""


def _sharing(layer: AttentionView) -> Iterator[str]:
    """What cannot be done to keys and values of a layer."""
    family = layer.family
    if family.qk_norm:
        yield (
            "share-kv: keys are merged by merge_keys: mean or first only, because queries and keys are normalised "
            "behind their projections"
        )
    elif layer.rotated:
        yield (
            "share-kv: keys are merged per pair of rotated coordinates "
            f"({layer.rotated} of {layer.layout.head_dim} in a head), which loses more than a free basis"
        )
    if family.ungrouped or (isinstance(layer.module, GroupedAttention) and not layer.layout.compressed):
        yield (
            "share-kv, cluster-heads: the class needs as many keys and values as queries; edited layers run an "
            "attention module of headwise, and load through headwise only"
        )
    elif family.model_types and "num_key_value_heads" not in family.config:
        yield (
            "share-kv: the class knows no shared kv heads; with them it runs under sdpa attention, not under eager, "
            "and loads through headwise only"
        )


def _tokens(layer: AttentionView) -> Iterator[str]:
    """What cannot be done to the tokens that a layer attends to."""
    reason = why_not_pruned(layer)
    if reason:
        yield f"prune-tokens: refused, because {reason}"


def _attention(layer: AttentionView) -> Iterator[str]:
    """What is special about how a layer attends and adds its output."""
    family = layer.family
    cap = attribute(layer.module, family.soft_cap) if family.soft_cap else None
    if cap is not None:
        yield (
            f"export: scores are capped at {cap:g} by a tanh, which runs under eager attention only; the graph has no "
            "Attention operator and repeats kv heads, and an engine has no fused attention kernel"
        )
    window = attribute(layer.module, family.window) if family.window else None
    if window is not None:
        yield f"kv cache: a token sees the last {window} tokens only; kv bytes per token count as if it saw all"
    if not layer.direct:
        yield (
            f"refit: the output passes {family.between} before it is added to the residual stream; every layer is "
            "fitted to its own output, without making up for earlier layers"
        )
