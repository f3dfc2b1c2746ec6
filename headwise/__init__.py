"""headwise: the smallest, fastest engine of a trained multi-head transformer that still passes your accuracy gate.

>>> import headwise
>>> run = headwise.compress("path/to/checkpoint", "recipe.yaml", "out")  # doctest: +SKIP
>>> model = headwise.load("out/01-prune-heads/model").module  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.errors import HeadwiseError
    from headwise.model.checkpoint import Checkpoint
    from headwise.model.checkpoint import load_checkpoint as load
    from headwise.model.view import ModelView
    from headwise.pipeline.recipe import Recipe, load_recipe
    from headwise.pipeline.run import Run, compress
    from headwise.version import __version__ as __version__

__all__ = ["Checkpoint", "HeadwiseError", "ModelView", "Recipe", "Run", "compress", "load", "load_recipe"]

# Resolved on first use: importing headwise must not import torch.
_HOMES = {
    "Checkpoint": ("headwise.model.checkpoint", "Checkpoint"),
    "HeadwiseError": ("headwise.errors", "HeadwiseError"),
    "ModelView": ("headwise.model.view", "ModelView"),
    "Recipe": ("headwise.pipeline.recipe", "Recipe"),
    "Run": ("headwise.pipeline.run", "Run"),
    "compress": ("headwise.pipeline.run", "compress"),
    "load": ("headwise.model.checkpoint", "load_checkpoint"),
    "load_recipe": ("headwise.pipeline.recipe", "load_recipe"),
    "__version__": ("headwise.version", "__version__"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
