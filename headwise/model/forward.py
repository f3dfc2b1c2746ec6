"""One way to call any model: a dict of named inputs in, a dict of named output tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from headwise.errors import CheckpointError

_NOT_AN_OUTPUT = frozenset({"past_key_values", "hidden_states", "attentions", "loss"})


def named_outputs(result: Any) -> dict[str, torch.Tensor]:
    """Names for whatever a ``forward`` returned.

    A mapping (a dict, or an output class of transformers) keeps its names, without caches and intermediate states; a
    tensor is called ``output``; the members of a tuple are called ``output_0``, ``output_1`` and so on.

    Raises:
        CheckpointError: the model returned no tensor at all.
    """
    if isinstance(result, torch.Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        pairs = [(str(name), value) for name, value in result.items() if name not in _NOT_AN_OUTPUT]
    elif isinstance(result, tuple | list):
        pairs = [(f"output_{index}", value) for index, value in enumerate(result)]
    else:
        pairs = []
    outputs = {name: value for name, value in pairs if isinstance(value, torch.Tensor)}
    if not outputs:
        raise CheckpointError(
            f"forward returned {type(result).__name__} without a tensor in it",
            expected="a tensor, a tuple of tensors, or a dict of named tensors",
            fix="let the model's forward return its outputs by name",
        )
    return outputs


def mask_name(inputs: Mapping[str, Any], *, decoder: bool) -> str | None:
    """The input that says which tokens are padding, of the encoder's or of the decoder's sequence.

    The inputs of a decoder start with ``decoder_``. A model that is given none of them has one sequence, or makes the
    decoder's from the encoder's token by token: then both are the same.
    """
    two = any(name.startswith("decoder_") for name in inputs)
    names = [
        name
        for name in inputs
        if name.endswith(("attention_mask", "padding_mask"))
        and inputs[name].ndim >= 1
        and (not two or name.startswith("decoder_") == decoder)
    ]
    return names[0] if names else None


def real_tokens(inputs: Mapping[str, np.ndarray], *, decoder: bool) -> np.ndarray | None:
    """True where a token is no padding, in the shape of the mask; None where there is no mask."""
    name = mask_name(inputs, decoder=decoder)
    if name is None:
        return None
    mask = inputs[name].astype(bool)
    return mask if name.endswith("attention_mask") else ~mask


def of_decoder(output: str) -> bool:
    """Whether an output per token is about the decoder's tokens, where a model has an encoder and a decoder."""
    return not output.startswith("encoder_")


def run(module: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Call ``module`` with named inputs and name its outputs."""
    return named_outputs(module(**batch))


def to_torch(batch: Mapping[str, np.ndarray], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The same batch as tensors on ``device``; the memory is shared where numpy allows it."""
    return {name: torch.as_tensor(value, device=device) for name, value in batch.items()}


def input_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The named parameters of ``module.forward``, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds)
