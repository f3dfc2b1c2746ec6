"""What must hold after surgery: the edited model equals its exact twin, and nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from headwise.errors import SurgeryError
from headwise.model.forward import of_decoder, real_tokens, run, to_torch
from headwise.model.view import ModelView
from headwise.tolerances import TWIN


def refuse_changed(view: ModelView, bystanders: Mapping[str, tuple[int, int]]) -> None:
    """Raise SurgeryError where a parameter is no longer what ``versions_outside`` saw."""
    if versions_outside(view) != bystanders:
        raise SurgeryError(
            "a weight outside the attention layers and MLPs changed",
            expected="only their projections to change",
            fix="this is a bug in headwise; please report it with the recipe",
        )


def require_exact(view: ModelView, twin: dict[str, torch.Tensor], batch: Mapping[str, np.ndarray]) -> float:
    """The largest relative difference; tokens of padding, which may see no token at all, are left out."""
    with torch.inference_mode():
        outputs = run(view.module, to_torch(batch))
    errors: list[torch.Tensor] = []
    for name, every in twin.items():
        valid = real_tokens(batch, decoder=of_decoder(name))
        per_token = valid is not None and every.dim() > 2 and tuple(every.shape[:2]) == valid.shape
        keep = torch.as_tensor(valid) if per_token else slice(None)
        expected, actual = every[keep], outputs[name][keep]
        errors.append((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    # Not Python's maximum, which passes over what is not a number.
    worst = float(torch.stack(errors).max())
    if not worst <= TWIN:
        raise SurgeryError(
            f"the edited model differs from its exact twin by {worst:.2g} of the largest output",
            expected=f"at most {TWIN:g}",
            fix="this is a bug in headwise; please report it with the model type and the recipe",
        )
    return worst


def versions_outside(view: ModelView) -> dict[str, tuple[int, int]]:
    """Identity and write count of every parameter outside attention and MLPs: any change to one shows."""
    inside = [layer.path for layer in view.attention] + [path for mlp in view.mlp for path in mlp.paths]
    paths = tuple(f"{path}." for path in inside)
    return {
        name: (id(parameter), parameter._version)
        for name, parameter in view.module.named_parameters()
        if not name.startswith(paths)
    }
