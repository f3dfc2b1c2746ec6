"""The attention function of layers that the original classes cannot compute, and of layers that are being watched.

It is registered with transformers under the name ``headwise``; the module for plain PyTorch calls it too. What it does
is said by the layout that surgery binds to the calling module.

Shape letters: B batch, T query tokens, S key tokens, H head_dim; N query heads, R of which have queries of their own;
K kv heads, J of which have keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headwise.errors import UnsupportedModelError
from headwise.model.layout import AttentionLayout
from headwise.model.masks import HIDDEN, boolean, seen_keys
from headwise.model.membership import membership
from headwise.model.prompt_cache import PromptLayer
from headwise.model.prompt_tokens import of_call, of_text
from headwise.model.token_budget import TokenBudget
from headwise.model.token_flow import flow_of
from headwise.model.token_select import Kept, Parts, keep_keys
from headwise.model.token_tally import turn_of
from headwise.model.windows import attend_in_blocks, visible_to_heads

NAME = "headwise"
Positions = list[int] | torch.Tensor
Form = Literal["gathered", "fused"]
See = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with attention weights, (B, N, T, S), and values, (B, N, S, H), one entry per query head."""

_LAYOUT, _SEE, _MEMBERS = "_headwise_layout", "_headwise_see", "_headwise_members"
_INSTEAD = "_headwise_instead"
_form: ContextVar[Form] = ContextVar("form", default="gathered")


@contextmanager
def form(name: Form) -> Iterator[None]:
    """Choose how clustered layers compute while the block runs.

    ``gathered`` computes the scores of representatives only and gathers their weights for all heads: the least work.
    ``fused`` gathers queries and keys instead: all scores are computed, by one fused kernel per layer.
    """
    token = _form.set(name)
    try:
        yield
    finally:
        _form.reset(token)


def bind(caller: nn.Module, layout: AttentionLayout) -> None:
    """Let ``caller``, the module that calls the attention function, compute what ``layout`` says."""
    setattr(caller, _LAYOUT, layout)
    if layout.custom and (config := getattr(caller, "config", None)) is not None:
        config._attn_implementation = NAME


def bound(caller: nn.Module) -> AttentionLayout | None:
    """The layout that was bound to a module."""
    return getattr(caller, _LAYOUT, None)


def watch(caller: nn.Module, see: See) -> AbstractContextManager[None]:
    """Call ``see`` on every forward of ``caller`` while the block runs."""
    return _told(caller, _SEE, see)


def replaced(caller: nn.Module, function: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
    """Let ``function``, which takes what ``attend`` takes and gives (B, T, N, H), attend for ``caller``."""
    return _told(caller, _INSTEAD, function)


@contextmanager
def _told(caller: nn.Module, name: str, value: object) -> Iterator[None]:
    config = getattr(caller, "config", None)
    previous = None if config is None else config._attn_implementation
    setattr(caller, name, value)
    if config is not None:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        delattr(caller, name)
        if config is not None:
            config._attn_implementation = previous


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers calls it.

    Args:
        module: the caller; what is bound to it decides how the layer runs.
        query: (B, R, T, H).
        key: (B, J, S, H).
        value: (B, K, S, H).
        attention_mask: broadcastable to (B, N, T, S), boolean (True = seen) or added to the scores; or None.
        **options: ``dropout``, ``scaling``, ``is_causal``, ``position_bias`` and ``softcap`` as in transformers;
            ``need_weights`` asks for the second result.

    Returns:
        (B, T, N, H), and weights (B, N, T, S) or None.
    """
    instead = getattr(module, _INSTEAD, None)
    if instead is not None:
        return instead(module, query, key, value, attention_mask, **options), None
    layout, watched = bound(module), getattr(module, _SEE, None) is not None
    explicit = watched or options.get("softcap") is not None or options.pop("need_weights", False)
    flow = flow_of(module)
    if layout is not None and layout.streaming and not explicit:
        return attend_in_blocks(module, layout, (query, key, value), attention_mask, **options), None
    if (layout is None or not layout.custom) and flow is None and not explicit:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    if layout is None:
        layout = plain(query.shape[1], value.shape[1], value.shape[-1])
    if layout.streaming:
        attention_mask = _within_windows(layout, query, key, attention_mask)
    cache = key if isinstance(key, PromptLayer) else None
    if cache is not None:
        # What the mask says of earlier tokens is known for those that are left.
        key, value = cache.taken()
        attention_mask = None if attention_mask is None else attention_mask[..., -query.shape[2] :]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    shift = _shift(module, layout, query, key, attention_mask, **options)
    if flow is not None:
        shift = flow.shift(shift)
        if layout.tokens is not None:
            flow.look(layout.tokens, Parts(query=query, key=key, value=value, scale=scale), shift)
    elif layout.tokens is not None:
        parts = Parts(query=query, key=key, value=value, scale=scale)
        kept = _kept(module, layout.tokens, parts, cache, shift)
        key, value, shift = kept.key, kept.value, kept.shift
        if shift is not None and shift.shape[1] > 1:
            shift = shift.repeat_interleave(layout.group, dim=1)
    if (flow is not None or layout.tokens is not None) and not explicit:
        grouped = {"scale": scale, "enable_gqa": layout.group > 1}
        return F.scaled_dot_product_attention(query, key, value, shift, **grouped).transpose(1, 2), None
    parts = Parts(query=query, key=key, value=value, scale=scale)
    return _attend_by_heads(module, layout, parts, shift, explicit=explicit, **options)


def _attend_by_heads(
    module: nn.Module,
    layout: AttentionLayout,
    parts: Parts,
    shift: torch.Tensor | None,
    *,
    explicit: bool,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Heads that score for themselves or for others; ``explicit`` asks for the weights. Results as of ``attend``."""
    query, key, value, scale = parts.query, parts.key, parts.value, parts.scale
    see = getattr(module, _SEE, None)
    use = _selection(module, layout, query, key, shift, scale)
    if shift is not None and shift.shape[1] > 1:
        shift = _take(shift, use.queries)
    queries, keys = _take(query, use.queries), _take(key, use.keys)
    if not explicit and _form.get() == "fused":
        queries, keys = _take(queries, use.weights), _take(keys, use.weights)
        values = _take(value, _readers(layout))
        shift = shift if shift is None or shift.shape[1] == 1 else _take(shift, use.weights)
        return F.scaled_dot_product_attention(queries, keys, values, shift, scale=scale).transpose(1, 2), None
    scores = queries @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores if shift is None else scores + shift, dim=-1)
    weights = _take(F.dropout(weights, dropout, training=module.training), use.weights)
    if see is not None:
        see(weights, value.repeat_interleave(layout.group, dim=1))
    # Each kv head's values meet the weights of all its readers at once, so that values are not repeated.
    grouped = weights.unflatten(1, (value.shape[1], -1)).flatten(2, 3)
    mixed = (grouped @ value).unflatten(2, (layout.group, -1)).flatten(1, 2)
    return mixed.transpose(1, 2), weights


def _kept(
    module: nn.Module, budget: TokenBudget, parts: Parts, cache: PromptLayer | None, shift: torch.Tensor | None
) -> Kept:
    """What the queries of a layer with a budget meet."""
    turn = turn_of(module)
    if cache is not None:
        return of_call(budget, parts, cache, shift, turn)
    return (of_text if budget.prompt else keep_keys)(budget, parts, shift, turn)


def require_all_seen(caller: nn.Module, all_seen: bool) -> None:
    """Raise where a module that works on a share of the tokens is called so that queries see different ones.

    Args:
        caller: the module that calls the attention function.
        all_seen: whether every query of a sample sees all of its tokens.

    Raises:
        UnsupportedModelError: the heads would choose tokens that some queries must not see.
    """
    layout = bound(caller)
    budgeted = flow_of(caller) is not None or (layout is not None and layout.tokens is not None)
    if budgeted and not all_seen:
        raise UnsupportedModelError(
            "prune-tokens on attention with an attn_mask, or to another sequence",
            expected="self-attention in which every query sees every token that is no padding",
            fix="leave the pass out: tokens are chosen for all queries of a sample",
        )


def plain(queries: int, kvs: int, head_dim: int) -> AttentionLayout:
    """A layout of this many heads, numbered by position."""
    return AttentionLayout(query=tuple(range(queries)), kv=tuple(range(kvs)), head_dim=head_dim)


class _Selection(NamedTuple):
    """Positions along head axes: the same for all samples, or (B, ...) tensors.

    Attributes:
        queries: per scoring head its position among the given queries.
        keys: per scoring head the position of the key head that it reads.
        weights: per query head the position of the scoring head whose weights it uses.
    """

    queries: Positions
    keys: Positions
    weights: Positions


def _selection(
    module: nn.Module,
    layout: AttentionLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    shift: torch.Tensor | None,
    scale: float,
) -> _Selection:
    scoring, keyed = layout.scoring, layout.keyed
    if not layout.online:
        return _Selection(
            queries=list(range(len(scoring))),
            keys=[keyed.index(layout.reads(head)) for head in scoring],
            weights=[scoring.index(head) for head in layout.represented or layout.query],
        )
    if query.shape[2] == key.shape[2]:
        seen = torch.ones_like(key[:1, 0, :, 0], dtype=torch.bool) if shift is None else shift[:, 0, -1] > HIDDEN / 2
        found = membership(query, _take(key, _readers(layout)), seen, layout.online, scale)
        if not torch.compiler.is_compiling():
            # The tokens that follow find a cache of keys, but no more queries of the first tokens.
            setattr(module, _MEMBERS, found)
    else:
        found = getattr(module, _MEMBERS)
    representatives, index = found
    return _Selection(queries=representatives, keys=representatives // layout.group, weights=index)


def _shift(
    module: nn.Module,
    layout: AttentionLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """What is added to the scores, broadcastable to (B, R, T, S); None where nothing is."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    new, every = query.shape[2], key.shape[2]
    if mask is None and causal and new > 1:
        mask = torch.ones(new, every, dtype=torch.bool, device=query.device).tril(every - new)[None, None]
    shift = None if mask is None else _additive(mask, query.dtype)
    if position_bias is None:
        return shift
    heads = [layout.query.index(head) for head in layout.scoring]
    bias = position_bias if position_bias.shape[1] == 1 else _take(position_bias, heads)
    return bias if shift is None else shift + bias


def _within_windows(
    layout: AttentionLayout, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """(B, N, T, S), true where a head sees a key: the mask of all heads, and the windows of some."""
    visible = visible_to_heads(layout, seen_keys(mask), query.shape[2], key.shape[2])
    return visible if mask is None else visible & boolean(mask)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, HIDDEN)
    return mask.to(dtype).clamp_min(HIDDEN)


def _readers(layout: AttentionLayout) -> list[int]:
    """Per query head the position of the kv head that it reads."""
    return [index // layout.group for index in range(len(layout.query))]


def _take(heads: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Select along the head axis; a selection of everything in order is no operation in a graph."""
    if isinstance(positions, torch.Tensor):
        index = positions[:, :, None, None].expand(-1, -1, *heads.shape[2:])
        return heads.expand(positions.shape[0], -1, -1, -1).gather(1, index)
    if positions == list(range(heads.shape[1])):
        return heads
    return heads.index_select(1, torch.tensor(positions, device=heads.device))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
