"""Key and value projections that read a latent, which one of them, or an earlier layer, computes.

They take the place of a layer's projections; the forward of the original class stays. Keys are projected before values
in all of them, so that the projection of keys computes the latent and leaves it for the others.

Shape letters: B batch, S tokens, D width of the input, r rank of the latent, K kv heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwise.errors import SurgeryError
from headwise.model.access import assign, attribute
from headwise.model.attention import linear
from headwise.model.layout import AttentionLayout


class Slot:
    """Holds a tensor, or several, between the module that computes it and those that read it in the same forward pass.

    No module itself, so that nothing of it is saved; the last reader empties it.

    Attributes:
        readers: how often it is read.
    """

    def __init__(self) -> None:
        self.readers = 0
        self._content: Any = None
        self._left = 0

    def put(self, content: Any) -> None:
        """Leave something for all readers."""
        self._content, self._left = content, self.readers

    def take(self) -> Any:
        """What was left.

        Raises:
            SurgeryError: nothing was: the module that computes it did not run before.
        """
        content = self._content
        if content is None:
            raise SurgeryError(
                "a layer reads keys and values that no layer has computed",
                expected="its owner to run before, in the same forward pass",
                fix="run the whole model, not this layer alone",
            )
        self._left -= 1
        if not self._left:
            self._content = None
        return content

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        # Modules that share a slot share the copy too, but not what lies in it.
        found = memo[id(self)] = Slot()
        found.readers = self.readers
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentProjections:
    """Keys and values of one layer by way of a latent.

    Attributes:
        owns: this layer computes the latent; otherwise an earlier one does.
        down: (r, D), or None where the latent is the input itself, or where an earlier layer computes it.
        key: (K, H, r) from the latent; ``value`` likewise.
        key_bias: (K, H) or None; ``value_bias`` likewise.
    """

    owns: bool
    down: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None

    def dense(self, down: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(K, H, D) keys and values as projections of the input that ``down`` reads, in float64."""
        if down is None:
            return self.key.double(), self.value.double()
        return self.key.double() @ down.double(), self.value.double() @ down.double()


class LatentKeys(nn.Module):
    """(B, S, D) -> (B, S, K * H), by way of a latent that it leaves in a slot.

    Attributes:
        down: D -> r; the identity where the latent is the input itself. None where an earlier layer computes it.
        up: r -> K * H.
        slot: where the latent lies.
    """

    def __init__(self, down: nn.Module | None, up: nn.Linear, slot: Slot) -> None:
        super().__init__()
        self.down = down
        self.up = up
        self.slot = slot

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.down is not None:
            self.slot.put(self.down(inputs))
        keys: torch.Tensor = self.up(self.slot.take())
        return keys


class LatentValues(nn.Module):
    """(B, S, D) -> (B, S, K * H), from the latent that ``LatentKeys`` left; the input is not looked at.

    Attributes:
        up: r -> K * H.
        slot: where the latent lies.
    """

    def __init__(self, up: nn.Linear, slot: Slot) -> None:
        super().__init__()
        self.up = up
        self.slot = slot

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        del inputs
        values: torch.Tensor = self.up(self.slot.take())
        return values


class Lent(nn.Linear):
    """A projection whose result other layers read too.

    Attributes:
        slot: where the result lies.
    """

    def __init__(self, like: nn.Linear, slot: Slot) -> None:
        weight = like.weight
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None, **place)
        self.load_state_dict(like.state_dict())
        self.requires_grad_(weight.requires_grad)
        self.slot = slot

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = super().forward(input)
        self.slot.put(found)
        return found


class Borrowed(nn.Module):
    """(B, S, D) -> (B, S, K * H): the result of an earlier layer's projection; the input is not looked at.

    Attributes:
        slot: where the result lies.
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        del inputs
        found: torch.Tensor = self.slot.take()
        return found


def read_latent(keys: nn.Module, values: nn.Module, head_dim: int) -> LatentProjections:
    """The weights of latent projections."""
    assert isinstance(keys, LatentKeys)
    assert isinstance(values, LatentValues)
    (key, key_bias), (value, value_bias) = (
        (p.up.weight.detach(), None if p.up.bias is None else p.up.bias.detach()) for p in (keys, values)
    )
    down = keys.down.weight.detach() if isinstance(keys.down, nn.Linear) else None
    return LatentProjections(
        owns=keys.down is not None,
        down=down,
        key=key.unflatten(0, (-1, head_dim)),
        value=value.unflatten(0, (-1, head_dim)),
        key_bias=None if key_bias is None else key_bias.unflatten(0, (-1, head_dim)),
        value_bias=None if value_bias is None else value_bias.unflatten(0, (-1, head_dim)),
    )


def build_latent(module: nn.Module, paths: tuple[str, str], new: LatentProjections) -> None:
    """Put latent projections in the place of those of keys and values, or new weights into those that are there.

    Args:
        module: the attention module.
        paths: from there to the projection of keys, and of values.
        new: their weights. Where an earlier layer computes the latent, ``read_from`` says which.
    """
    old = [attribute(module, path) for path in paths]
    there = isinstance(old[0], LatentKeys)
    slot, like = (old[0].slot, old[0].up.weight) if there else (Slot(), old[0].weight)
    if not there:
        slot.readers = 2
    down: nn.Module | None = None
    if new.owns:
        down = nn.Identity() if new.down is None else _linear(new.down, None, like)
    keys = LatentKeys(down, _linear(new.key.flatten(0, 1), _flat(new.key_bias), like), slot)
    values = LatentValues(_linear(new.value.flatten(0, 1), _flat(new.value_bias), like), slot)
    for path, made, before in zip(paths, (keys, values), old, strict=True):
        assign(module, path, made.train(before.training))


def read_from(owner: nn.Module, module: nn.Module, paths: tuple[str, str]) -> None:
    """Let the latent projections of one attention module read the latent of another one of the same class."""
    slot = attribute(owner, paths[0]).slot
    for path in paths:
        attribute(module, path).slot = slot
    slot.readers += 2


def lend(module: nn.Module, paths: tuple[str, str], borrower: nn.Module) -> None:
    """Let another module of the same class read the keys and values of this one.

    Args:
        module: the attention module of the owner.
        paths: from there to the projection of keys, and of values.
        borrower: the attention module of the layer that reads them.
    """
    for path in paths:
        lender = attribute(module, path)
        if not isinstance(lender, Lent):
            lender = Lent(lender, Slot()).train(lender.training)
            assign(module, path, lender)
        lender.slot.readers += 1
        assign(borrower, path, Borrowed(lender.slot).train(borrower.training))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Parameter) -> nn.Linear:
    made = linear(weight.to(like), None if bias is None else bias.to(like))
    return made.requires_grad_(like.requires_grad)


def _flat(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.flatten()


def latent_cost(layout: AttentionLayout, width: int, rank: int) -> dict[str, int]:
    """Multiply-accumulates of keys and values through a latent, and of attention on what comes out.

    Args:
        layout: the layer.
        width: D.
        rank: r.

    Returns:
        ``dense``, ``unabsorbed`` and ``absorbed``: per token, for projections. ``pair`` and ``absorbed_pair``: per pair
        of a query and a key token. Absorbed, the up-projections move to queries and outputs, and scores and mixes are
        as wide as the latent.
    """
    heads, kvs, head_dim = len(layout.query), len(layout.kv), layout.head_dim
    down = 0 if rank == width else width * rank
    return {
        "dense": 2 * width * kvs * head_dim,
        "unabsorbed": down + 2 * rank * kvs * head_dim,
        "absorbed": down + 2 * rank * heads * head_dim,
        "pair": 2 * heads * head_dim,
        "absorbed_pair": 2 * heads * rank,
    }
