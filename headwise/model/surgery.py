"""The only code that changes a weight. Passes decide; this file acts.

Shape letters: D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from headwise.errors import SurgeryError
from headwise.model.attend import form
from headwise.model.edits import (
    ClusterHeads,
    ClusterOnline,
    DropHeads,
    DropNeurons,
    EditPlan,
    ShareKV,
)
from headwise.model.handed import compute_own
from headwise.model.latent_edits import LatentKV, ShareLayers
from headwise.model.latent_surgery import (
    LatentWeights,
    LentHeads,
    compressed_twins,
    latent_kv,
    reshape_compressed,
    share_layers,
)
from headwise.model.latent_swap import RotaryLatent
from headwise.model.layout import AttentionLayout, Layout
from headwise.model.mlp import MlpView
from headwise.model.projections import Projections, pick
from headwise.model.shared_kv import SharedKV, ValueHeads, mapped
from headwise.model.surgery_mlp import drop_neurons, reshape_mlp
from headwise.model.surgery_windows import in_place, stream_heads
from headwise.model.token_edits import KeepTokens
from headwise.model.token_flow import MaskedFlow
from headwise.model.token_select import masked_tokens
from headwise.model.token_surgery import let_leave
from headwise.model.view import AttentionView, ModelView
from headwise.model.window_edits import StreamHeads
from headwise.model.writing import write, write_output, written

Payloads = Mapping[int, SharedKV | LatentWeights | RotaryLatent | LentHeads]
"""Position of an edit in its plan -> the numbers that it needs; edits that only select need none."""


def apply(model: ModelView, plan: EditPlan, payloads: Payloads | None = None) -> None:
    """Make the plan's edits, in order, in place.

    Raises:
        PlanError: an edit does not fit; nothing has been changed.
        SurgeryError: the model did not land where the plan said.
    """
    plan.check(model.layout)
    predicted = plan.predict(model.layout)
    compute_own(model)
    for position, edit in enumerate(plan.edits):
        if isinstance(edit, DropNeurons):
            drop_neurons(model.mlp[edit.layer], edit)
            continue
        layer, payload = model.attention[edit.layer], (payloads or {}).get(position)
        match edit:
            case DropHeads():
                drop_heads(layer, edit)
            case ShareKV():
                share_kv(layer, edit, _shared(payload))
            case LatentKV():
                assert isinstance(payload, LatentWeights | RotaryLatent), "passes give every edit its numbers"
                latent_kv(layer, edit.apply(layer.layout), payload)
            case ShareLayers():
                assert not isinstance(payload, SharedKV), "passes give every edit its own numbers"
                share_layers(model, edit, payload)
            case ClusterHeads():
                cluster_heads(layer, edit)
            case ClusterOnline() | KeepTokens():
                write(layer, layer.read(), edit.apply(layer.layout))
            case StreamHeads():
                stream_heads(layer, edit)
    let_leave(model)
    _require_landed(model, predicted)


def _require_landed(model: ModelView, predicted: Layout) -> None:
    """Raise SurgeryError where layouts or weights are not those that the plan said."""
    for view, want in zip(model.attention, predicted.attention, strict=True):
        if view.layout != want or not view.fits():
            have = view.layout
            raise SurgeryError(
                f"layer {view.index} has {len(have.query)} query and {len(have.kv)} kv heads after surgery",
                expected=f"{len(want.query)} and {len(want.kv)}, as planned, and weights of that many",
                fix="this is a bug in headwise; please report it with the model type and the plan",
            )
    for mlp, left in zip(model.mlp, predicted.mlp, strict=True):
        if mlp.layout != left or len(mlp.count().neurons) != len(left.neurons):
            raise SurgeryError(
                f"MLP {mlp.index} has {len(mlp.count().neurons)} neurons after surgery",
                expected=f"{len(left.neurons)}, as planned",
                fix="this is a bug in headwise; please report it with the model type and the plan",
            )


@contextmanager
def twin(model: ModelView, plan: EditPlan, payloads: Payloads | None = None) -> Iterator[None]:
    """Let the unedited model compute what the edited one must compute, without removing or moving anything.

    Dropped heads and neurons are gated to zero. Shared heads are written out for each of their readers, and so are the
    queries and keys of representatives. Projections by way of a latent are multiplied out. Windows are masks, and keys
    that a head does not keep are hidden from it.
    """
    compute_own(model)
    with ExitStack() as stack:
        stack.callback(let_leave, model)
        for layer in model.attention:
            gone = {h for e in plan.edits if isinstance(e, DropHeads) and e.layer == layer.index for h in e.query}
            gates = [0.0 if head in gone else 1.0 for head in layer.layout.query]
            stack.enter_context(layer.gate(torch.tensor(gates, dtype=layer.read().output.dtype)))
        for mlp in model.mlp:
            gone = {n for e in plan.edits if isinstance(e, DropNeurons) and e.layer == mlp.index for n in e.neurons}
            if gone:
                gates = [0.0 if neuron in gone else 1.0 for neuron in mlp.layout.neurons]
                stack.enter_context(mlp.gate(torch.tensor(gates, dtype=mlp.linear()[0].dtype)))
        for position, edit in enumerate(plan.edits):
            if isinstance(edit, ShareKV):
                layer = model.attention[edit.layer]
                shared = _shared((payloads or {}).get(position))
                stack.enter_context(written(layer, *_spread_shared(layer, edit, shared)))
            if isinstance(edit, ClusterHeads):
                layer = model.attention[edit.layer]
                stack.enter_context(written(layer, *_spread_clusters(layer, edit)))
            if isinstance(edit, ClusterOnline):
                # Which heads are alike is known sample by sample only: every head computes scores, with the queries
                # and keys of its representative.
                layer = model.attention[edit.layer]
                stack.enter_context(written(layer, layer.read(), edit.apply(layer.layout)))
                stack.enter_context(form("fused"))
            if isinstance(edit, StreamHeads):
                # All scores are computed, head by head where the heads are, and hidden by a mask.
                layer = model.attention[edit.layer]
                stack.enter_context(written(layer, layer.read(), in_place(layer.layout, edit)))
                stack.enter_context(layer.watch_weights(lambda *_: None))
            if isinstance(edit, KeepTokens):
                layer = model.attention[edit.layer]
                stack.enter_context(written(layer, layer.read(), edit.apply(layer.layout)))
                stack.enter_context(masked_tokens())
        let_leave(model, MaskedFlow)
        stack.enter_context(compressed_twins(model, plan.edits, payloads or {}))
        yield


def _shared(payload: object) -> SharedKV:
    assert isinstance(payload, SharedKV), "passes give every edit the numbers that it needs"
    return payload


def _spread_clusters(view: AttentionView, edit: ClusterHeads) -> tuple[Projections, AttentionLayout]:
    """Every head with the queries and keys of its representative, as multi-head attention."""
    old, layout = view.read(), view.layout
    used = [layout.query.index(head) for head in edit.apply(layout).represented or layout.query]
    keys = [layout.kv.index(layout.reads(layout.query[position])) for position in used]
    values = [layout.kv.index(layout.reads(head)) for head in layout.query]
    spread = Projections(
        query=old.query[used],
        key=old.key[keys],
        value=old.value[values],
        output=old.output,
        query_bias=pick(old.query_bias, used),
        key_bias=pick(old.key_bias, keys),
        value_bias=pick(old.value_bias, values),
        output_bias=old.output_bias,
        further={path: parts[used] for path, parts in old.further.items()},
    )
    return spread, replace(layout, kv=tuple(range(len(used))))


def _spread_shared(view: AttentionView, edit: ShareKV, shared: SharedKV) -> tuple[Projections, AttentionLayout]:
    """Every kv head as the map of its group's shared head."""
    old, layout = view.read(), view.layout
    group_of = {head: index for index, group in enumerate(edit.groups) for head in group}
    groups = [group_of[head] for head in layout.kv]
    bias = old.output_bias if shared.output_bias is None else _added(old.output_bias, shared.output_bias)
    spread = replace(
        old,
        key=mapped(shared.key_maps, shared.key[groups]),
        value=mapped(shared.value_maps, shared.value[groups]),
        key_bias=None if shared.key_bias is None else mapped(shared.key_maps, shared.key_bias[groups]),
        value_bias=None if shared.value_bias is None else mapped(shared.value_maps, shared.value_bias[groups]),
        output_bias=bias,
    )
    return spread, layout


def share_kv(view: AttentionView, edit: ShareKV, shared: SharedKV) -> None:
    """Put one kv head in the place of each group; its maps move into the queries and the output projection."""
    old, layout = view.read(), edit.apply(view.layout)
    order = [view.layout.query.index(head) for head in layout.query]
    reads = [index // view.layout.group for index in order]
    key_maps, value_maps = shared.key_maps[reads], shared.value_maps[reads]
    query_bias = None if old.query_bias is None else mapped(key_maps.mT, old.query_bias[order])
    new = Projections(
        query=mapped(key_maps.mT, old.query[order]),
        key=shared.key,
        value=shared.value,
        output=torch.einsum("dnh,nhi->dni", old.output[:, order].double(), value_maps.double()),
        query_bias=query_bias,
        key_bias=shared.key_bias,
        value_bias=shared.value_bias,
        output_bias=old.output_bias if shared.output_bias is None else _added(old.output_bias, shared.output_bias),
        further={path: parts[order] for path, parts in old.further.items()},
    )
    write(view, new, layout)


def _added(bias: torch.Tensor | None, delta: torch.Tensor) -> torch.Tensor:
    assert bias is not None, "a constant is only folded where there is an output bias"
    return bias.double() + delta.double()


def cluster_heads(view: AttentionView, edit: ClusterHeads) -> None:
    """Slice the queries of members out, and the keys that no representative reads."""
    old, before, layout = view.read(), view.layout, edit.apply(view.layout)
    queries = [before.query.index(head) for head in layout.scoring]
    keys = [before.kv.index(head) for head in layout.keyed]
    new = replace(
        old,
        query=old.query[queries],
        key=old.key[keys],
        query_bias=pick(old.query_bias, queries),
        key_bias=pick(old.key_bias, keys),
    )
    write(view, new, layout)


def drop_heads(view: AttentionView, edit: DropHeads) -> None:
    """Slice removed heads out of all four projections. Exact twin: their gates at zero."""
    layout = edit.apply(view.layout)
    queries = [view.layout.query.index(head) for head in layout.query]
    kvs = [view.layout.kv.index(head) for head in layout.kv]
    write(view, view.read().of(queries, kvs), layout)


def set_output(view: AttentionView | MlpView, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Replace the output projection of an attention layer, or the down projection of an MLP.

    Args:
        view: the layer.
        weight: (D, F), F = N * H for attention.
        bias: (D,), or None where the layer has none.
    """
    if (bias is None) != (view.linear()[1] is None):
        raise SurgeryError(
            f"layer {view.index}: a bias {'is missing' if bias is None else 'is given'} for the output projection",
            expected="a bias exactly where the original layer has one",
            fix="fold constants only into layers that have an output bias",
        )
    write_output(view, weight, bias)


def set_values(view: AttentionView, values: ValueHeads) -> None:
    """Replace the value heads of a layer."""
    write(view, replace(view.read(), value=values.weight, value_bias=values.bias), view.layout)


@torch.no_grad()
def set_projections(view: AttentionView, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters of a layer by others of their shapes; names are those of ``AttentionView.projections``."""
    for name, value in weights.items():
        view.module.get_parameter(name).copy_(value)


@contextmanager
def other_values(view: AttentionView, values: ValueHeads) -> Iterator[None]:
    """Other value heads while the block runs."""
    with written(view, replace(view.read(), value=values.weight, value_bias=values.bias), view.layout):
        yield


def reshape(model: ModelView, layout: Layout) -> None:
    """Give every layer the shapes of ``layout``, with zeros in it, so that saved weights can be loaded."""
    compute_own(model)
    for view, entry in zip(model.attention, layout.attention, strict=True):
        old = view.read()
        n, k, h = len(entry.query), len(entry.kv), entry.head_dim
        r, j = len(entry.scoring), len(entry.keyed)
        zeros = Projections(
            query=old.query.new_zeros(r, h, old.query.shape[2]),
            key=old.key.new_zeros(j, h, old.key.shape[2]),
            value=old.value.new_zeros(k, h, old.value.shape[2]),
            output=old.output.new_zeros(old.output.shape[0], n, h),
            query_bias=None if old.query_bias is None else old.query_bias.new_zeros(r, h),
            key_bias=None if old.key_bias is None else old.key_bias.new_zeros(j, h),
            value_bias=None if old.value_bias is None else old.value_bias.new_zeros(k, h),
            output_bias=old.output_bias,
            further={path: parts.new_zeros(n, *parts.shape[1:]) for path, parts in old.further.items()},
        )
        write(view, zeros, replace(entry, latent=0, owner=None))
        if entry.compressed:
            reshape_compressed(model, view, entry)
    let_leave(model)
    # Layouts of version 0.1.0 say nothing about neurons.
    for mlp, neurons in zip(model.mlp, layout.mlp, strict=False):
        reshape_mlp(mlp, neurons)
