"""Put a weight into a projection, whatever its class calls its sizes."""

from __future__ import annotations

import torch
from torch import nn


def store(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool) -> None:
    """Replace the parameters of a projection in the dtype that they have.

    Args:
        module: the projection.
        weight: (out, in).
        bias: (out,); None leaves the bias as it is.
        transposed: the module keeps its weight as (in, out).
    """
    out_features, in_features = weight.shape
    stored = weight.T if transposed else weight
    old = module.get_parameter("weight")
    trained = old.requires_grad
    module.register_parameter("weight", nn.Parameter(stored.to(old.dtype).contiguous().clone(), trained))
    if bias is not None:
        module.register_parameter("bias", nn.Parameter(bias.to(old.dtype).clone(), trained))
    sizes = {"out_features": out_features, "in_features": in_features, "nf": out_features, "nx": in_features}
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)
