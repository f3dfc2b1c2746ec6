"""The only code that changes a weight. Passes decide; this file acts.

Shape letters: D model width, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from headwise.errors import SurgeryError
from headwise.model.access import assign, attribute
from headwise.model.layout import AttentionLayout, DropHeads, EditPlan, Layout, ShareKV
from headwise.model.mlp import MlpView
from headwise.model.neurons import DropNeurons
from headwise.model.surgery_mlp import drop_neurons, reshape_mlp
from headwise.model.surgery_store import store
from headwise.model.view import AttentionView, ModelView, Projections


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedKV:
    """The numbers of a ``ShareKV`` edit.

    Attributes:
        key: (G, H, D) shared key heads, in the order of the edit's groups; ``value``: the same for values.
        key_bias: (G, H), or None where keys have no bias; ``value_bias``: the same for values.
        key_maps: (K, H, H), one per old kv head in storage order: that head's keys are ``key_maps[j]`` times the keys
            of its group, up to what the merge loses; ``value_maps``: the same for values.
        output_bias: (D,) to add to the output bias; None where there is none.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    key_maps: torch.Tensor
    value_maps: torch.Tensor
    output_bias: torch.Tensor | None


Payloads = Mapping[int, SharedKV]
"""Position of an edit in its plan -> the numbers that it needs; edits that only select need none."""


def apply(model: ModelView, plan: EditPlan, payloads: Payloads | None = None) -> None:
    """Make the plan's edits, in order, in place.

    Raises:
        PlanError: an edit does not fit; nothing has been changed.
        SurgeryError: the model did not land where the plan said.
    """
    plan.check(model.layout)
    predicted = plan.predict(model.layout)
    for position, edit in enumerate(plan.edits):
        match edit:
            case DropHeads():
                drop_heads(model.attention[edit.layer], edit)
            case ShareKV():
                share_kv(model.attention[edit.layer], edit, (payloads or {})[position])
            case DropNeurons():
                drop_neurons(model.mlp[edit.layer], edit)
    counted = tuple(view.count() for view in model.attention)
    for view, want, have in zip(model.attention, predicted.attention, counted, strict=True):
        if view.layout != want or (len(have.query), len(have.kv)) != (len(want.query), len(want.kv)):
            raise SurgeryError(
                f"layer {view.index} has {len(have.query)} query and {len(have.kv)} kv heads after surgery",
                expected=f"{len(want.query)} and {len(want.kv)}, as planned",
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

    Dropped heads and neurons are gated to zero. Shared heads are written out for each of their readers.
    """
    with ExitStack() as stack:
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
                stack.enter_context(_written_out(model.attention[edit.layer], edit, (payloads or {})[position]))
        yield


@contextmanager
def _written_out(view: AttentionView, edit: ShareKV, shared: SharedKV) -> Iterator[None]:
    old, layout = view.read(), view.layout
    group_of = {head: index for index, group in enumerate(edit.groups) for head in group}
    groups = [group_of[head] for head in layout.kv]
    bias = old.output_bias if shared.output_bias is None else _added(old.output_bias, shared.output_bias)
    write(
        view,
        replace(
            old,
            key=_mapped(shared.key_maps, shared.key[groups]),
            value=_mapped(shared.value_maps, shared.value[groups]),
            key_bias=None if shared.key_bias is None else _mapped(shared.key_maps, shared.key_bias[groups]),
            value_bias=None if shared.value_bias is None else _mapped(shared.value_maps, shared.value_bias[groups]),
            output_bias=bias,
        ),
        layout,
    )
    try:
        yield
    finally:
        write(view, old, layout)


def share_kv(view: AttentionView, edit: ShareKV, shared: SharedKV) -> None:
    """Put one kv head in the place of each group; its maps move into the queries and the output projection."""
    old, layout = view.read(), edit.apply(view.layout)
    order = [view.layout.query.index(head) for head in layout.query]
    reads = [index // view.layout.group for index in order]
    key_maps, value_maps = shared.key_maps[reads], shared.value_maps[reads]
    query_bias = None if old.query_bias is None else _mapped(key_maps.mT, old.query_bias[order])
    new = Projections(
        query=_mapped(key_maps.mT, old.query[order]),
        key=shared.key,
        value=shared.value,
        output=torch.einsum("dnh,nhi->dni", old.output[:, order].double(), value_maps.double()),
        query_bias=query_bias,
        key_bias=shared.key_bias,
        value_bias=shared.value_bias,
        output_bias=old.output_bias if shared.output_bias is None else _added(old.output_bias, shared.output_bias),
    )
    write(view, new, layout)


def _mapped(maps: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """(J, H, H) times (J, H, D) or (J, H), in float64."""
    return torch.einsum("jab,jb...->ja...", maps.double(), heads.double())


def _added(bias: torch.Tensor | None, delta: torch.Tensor) -> torch.Tensor:
    assert bias is not None, "a constant is only folded where there is an output bias"
    return bias.double() + delta.double()


def drop_heads(view: AttentionView, edit: DropHeads) -> None:
    """Slice removed heads out of all four projections. Exact twin: their gates at zero."""
    layout = edit.apply(view.layout)
    queries = [view.layout.query.index(head) for head in layout.query]
    kvs = [view.layout.kv.index(head) for head in layout.kv]
    old = view.read()
    new = Projections(
        query=old.query[queries],
        key=old.key[kvs],
        value=old.value[kvs],
        output=old.output[:, queries],
        query_bias=_pick(old.query_bias, queries),
        key_bias=_pick(old.key_bias, kvs),
        value_bias=_pick(old.value_bias, kvs),
        output_bias=old.output_bias,
    )
    write(view, new, layout)


def set_output(view: AttentionView | MlpView, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Replace the output projection of an attention layer, or the down projection of an MLP.

    Args:
        view: the layer.
        weight: (D, N, H) or (D, N * H) for attention, (D, F) for an MLP.
        bias: (D,), or None where the layer has none.
    """
    old, old_bias = view.linear()
    if (bias is None) != (old_bias is None):
        raise SurgeryError(
            f"layer {view.index}: a bias {'is missing' if bias is None else 'is given'} for the output projection",
            expected="a bias exactly where the original layer has one",
            fix="fold constants only into layers that have an output bias",
        )
    transposed = view.transposed if isinstance(view, MlpView) else view.family.transposed
    store(view.output, weight.reshape(old.shape), bias, transposed=transposed)


def reshape(model: ModelView, layout: Layout) -> None:
    """Give every layer the shapes of ``layout``, with zeros in it, so that saved weights can be loaded."""
    for view, entry in zip(model.attention, layout.attention, strict=True):
        old = view.read()
        n, k, h = len(entry.query), len(entry.kv), entry.head_dim
        zeros = Projections(
            query=old.query.new_zeros(n, h, old.query.shape[2]),
            key=old.key.new_zeros(k, h, old.key.shape[2]),
            value=old.value.new_zeros(k, h, old.value.shape[2]),
            output=old.output.new_zeros(old.output.shape[0], n, h),
            query_bias=None if old.query_bias is None else old.query_bias.new_zeros(n, h),
            key_bias=None if old.key_bias is None else old.key_bias.new_zeros(k, h),
            value_bias=None if old.value_bias is None else old.value_bias.new_zeros(k, h),
            output_bias=old.output_bias,
        )
        write(view, zeros, entry)
    for mlp, neurons in zip(model.mlp, layout.mlp, strict=False):
        reshape_mlp(mlp, neurons)


def write(view: AttentionView, new: Projections, layout: AttentionLayout) -> None:
    """Store projections the way the family stores them, and keep its head counts true."""
    family = view.family
    weights = [w.flatten(0, 1) for w in (new.query, new.key, new.value)]
    biases = [None if b is None else b.flatten() for b in (new.query_bias, new.key_bias, new.value_bias)]
    if family.fused:
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        store(attribute(view.module, family.query), torch.cat(weights), bias, transposed=family.transposed)
    else:
        for path, weight, bias in zip((family.query, family.key, family.value), weights, biases, strict=True):
            store(attribute(view.module, path), weight, bias, transposed=family.transposed)
    store(view.output, new.output.flatten(1), new.output_bias, transposed=family.transposed)
    for path, count in family.bookkeeping.items():
        assign(view.module, path, count(layout))
    view.layout = layout


def _pick(bias: torch.Tensor | None, heads: list[int]) -> torch.Tensor | None:
    return None if bias is None else bias[heads]
