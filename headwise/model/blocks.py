"""One block of a decoder as a model of its own, so that only this block is in memory.

The model around the block is the stock class with one layer, which makes masks and rotary positions as it always does;
it is fed hidden states in the place of token embeddings.

Shape letters: B batch rows, T tokens, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from headwise.errors import CheckpointError, UnsupportedModelError
from headwise.model.access import hooked
from headwise.model.families import FAMILIES
from headwise.model.layout import Layout
from headwise.model.shards import Shards
from headwise.model.sources import fresh_class, quietly
from headwise.model.view import ModelView


class HiddenStates:
    """Hidden states of all tokens of all samples.

    Attributes:
        flat: (tokens, D) float32, one sample behind the other.
    """

    def __init__(self, flat: torch.Tensor, lengths: Sequence[int]) -> None:
        """Args:
        flat: see above.
        lengths: tokens of every sample.
        """
        self.flat = flat
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self._spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def batch(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        """(B, T, D) of these samples, the first T tokens of each, with zeros behind those that have fewer."""
        found = self.flat.new_zeros(len(rows), tokens, self.flat.shape[1])
        for place, row in enumerate(rows.tolist()):
            states = self.flat[self._spans[row]][:tokens]
            found[place, : len(states)] = states
        return found

    def put(self, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Keep (B, T, D) of these samples; what lies behind a sample's tokens is dropped."""
        for place, row in enumerate(rows.tolist()):
            span = self._spans[row]
            self.flat[span] = states[place, : span.stop - span.start]

    def like(self) -> HiddenStates:
        """The same samples, with states still to be put in."""
        other = copy.copy(self)
        other.flat = torch.empty_like(self.flat)
        return other


class Block(nn.Module):
    """A block that runs on stored hidden states.

    Attributes:
        backbone: the stock model with this one layer.
        states: what the block is given; can be replaced by those of another model.
    """

    def __init__(self, backbone: PreTrainedModel, block: nn.Module, states: HiddenStates) -> None:
        super().__init__()
        self.backbone = backbone
        self.states = states
        # In a list, so that its parameters belong to the backbone alone.
        self._block = [block]

    @property
    def block(self) -> nn.Module:
        """The block itself, as the whole model has it."""
        return self._block[0]

    def forward(self, row: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B,) samples and (B, T) their mask -> (B, T, D) the residual stream behind the block."""
        seen: list[torch.Tensor] = []

        def see(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
            seen.append(result if isinstance(result, torch.Tensor) else result[0])

        given = self.states.batch(row, attention_mask.shape[1])
        with hooked(self.block.register_forward_hook(see)):
            self.backbone(inputs_embeds=given, attention_mask=attention_mask, use_cache=False)
        return seen[0]

    def twin(self) -> Block:
        """A second block with the same parameters; putting others into one of them leaves the other as it is."""
        memo: dict[int, Any] = {id(parameter): parameter for parameter in self.parameters()}
        memo[id(self.states)] = self.states
        return copy.deepcopy(self, memo)


class BlockSource:
    """A decoder in a directory, block by block.

    Attributes:
        shards: its tensors.
        skeleton: the whole model without weights, on the meta device.
        view: the skeleton's layers and MLPs.
    """

    def __init__(self, folder: Path, layout: Layout | None = None) -> None:
        """Args:
        folder: a checkpoint of transformers.
        layout: heads and neurons by original id, where they are not numbered by position.

        Raises:
            CheckpointError: it cannot be read, or does not hold the weights that its config asks for.
            UnsupportedModelError: a block of it cannot run alone.
        """
        self.shards = Shards(folder)
        self.skeleton = _skeleton(folder)
        self.view = ModelView.of(self.skeleton)
        _refuse_together(self.view)
        self._stored = self._known_tensors()
        if layout is not None:
            self.view.rename(layout)
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        self._prefixes = [f"{names[id(layer.block)]}." for layer in self.view.attention]

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._prefixes)

    def names(self, index: int) -> list[str]:
        """The tensors of a block."""
        return [name for name in self._stored if name.startswith(self._prefixes[index])]

    def others(self) -> list[str]:
        """The tensors that belong to no block."""
        return [name for name in self._stored if not name.startswith(tuple(self._prefixes))]

    def embed(self, rows: Sequence[torch.Tensor]) -> HiddenStates:
        """What the first block is given of these samples, token ids (T,) each."""
        module: Any = self.skeleton.get_input_embeddings()
        names = {id(child): name for name, child in self.skeleton.named_modules()}
        name = f"{names[id(module)]}.weight"
        flat = torch.cat(list(rows))
        return HiddenStates(self.shards.read([name])[name][flat].float(), [len(row) for row in rows])

    def block(self, index: int, states: HiddenStates) -> Block:
        """A block in float32 and eval mode."""
        config = _of_one(self.skeleton.config, index)
        prefix = self._prefixes[index]
        tensors = self.shards.read(self.names(index))
        backbone_class: Any = type(self.skeleton.base_model)
        path = ModelView.of(self.skeleton.base_model).attention[0].path
        first = path.removesuffix("." + self.view.attention[0].family.attention)
        given = {f"{first}.{name.removeprefix(prefix)}": tensors.pop(name) for name in list(tensors)}
        with quietly():
            backbone = backbone_class.from_pretrained(None, config=config, state_dict=given, dtype=torch.float32)
        backbone.eval().requires_grad_(False)
        return Block(backbone, backbone.get_submodule(first), states)

    def open(self, block: Block, index: int) -> ModelView:
        """The view of a block that was made from this source, with the ids of its heads and neurons."""
        found = ModelView.of(block)
        whole = self.view.layout
        found.rename(Layout(attention=whole.attention[index : index + 1], mlp=whole.mlp[index : index + 1]))
        return found

    def types(self, index: int) -> dict[str, torch.dtype]:
        """The type in which each tensor of a block is stored, by its name in the block."""
        prefix = self._prefixes[index]
        return {name.removeprefix(prefix): self.shards.dtype(name) for name in self.names(index)}

    def tensors(self, block: Block, index: int) -> dict[str, torch.Tensor]:
        """The weights of a block under their names in the whole model, in the types that the source stores."""
        types = self.types(index)
        # Buffers, such as the frequencies of latent attention, keep their own type.
        trained = {name for name, _ in block.block.named_parameters()}
        return {
            self._prefixes[index] + name: tensor.to(_stored_type(types, name)) if name in trained else tensor
            for name, tensor in block.block.state_dict().items()
        }

    def round(self, block: Block, index: int) -> None:
        """Give a block the weights that ``tensors`` stores of it, so that what follows sees what is written."""
        types = self.types(index)
        for name, parameter in block.block.named_parameters():
            rounded = parameter.to(_stored_type(types, name)).to(parameter.dtype)
            # One that the source had is stored as it was, and may belong to a twin as well.
            if not torch.equal(rounded, parameter):
                parameter.data = rounded

    def _known_tensors(self) -> list[str]:
        """The tensors of the files that the model has; as in transformers, others are left out.

        Raises:
            CheckpointError: one is missing or has another shape.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}
        tied = set(getattr(self.skeleton, "all_tied_weights_keys", None) or {})
        for name, shape in wanted.items():
            if name not in self.shards.files and name in tied:
                continue
            found = self.shards.shape(name) if name in self.shards.files else None
            if found != shape:
                raise CheckpointError(
                    f"{self.shards.folder} has {'no ' + name if found is None else f'{name} of shape {found}'}",
                    expected=f"{name} of shape {shape}, as config.json says",
                    fix="use files under the names of transformers; unequal layers are loaded by `headwise compress`",
                )
        return [name for name in self.shards.files if name in wanted]


def _stored_type(types: Mapping[str, torch.dtype], name: str) -> torch.dtype:
    """That of a new tensor is the type of the block's first one."""
    return types.get(name, next(iter(types.values())))


def _skeleton(folder: Path) -> Any:
    """The model of a directory on the meta device."""
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        cls = fresh_class(config)
        with torch.device("meta"), quietly():
            return cls.from_config(config) if cls is transformers.AutoModel else cls(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} cannot be read: {str(error).strip().splitlines()[0]}",
            expected="a checkpoint directory of transformers",
            fix="name the directory that holds config.json and the safetensors files",
        ) from error


def _of_one(config: Any, index: int) -> Any:
    """The config of a model that has this layer only, and no vocabulary to speak of."""
    one: Any = copy.deepcopy(config)
    one.num_hidden_layers, one.vocab_size = 1, 1
    one.pad_token_id = one.bos_token_id = one.eos_token_id = None
    if getattr(one, "layer_types", None):
        one.layer_types = [one.layer_types[index]]
    return one


def _refuse_together(view: ModelView) -> None:
    """Raise UnsupportedModelError where a block needs more than hidden states."""
    for layer in view.attention:
        if not layer.family.by_block:
            raise UnsupportedModelError(
                f"blocks of {layer.family.name} are not known to run alone",
                expected="one of: " + ", ".join(sorted(name for name, f in FAMILIES.items() if f.by_block)),
                fix="use `headwise compress`, which loads the whole model",
            )
