"""The base of every piece of a recipe: immutable, and strict about unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """Options of one component, as written in a recipe.

    Each component owns its options next to its code; ``pipeline/recipe.py`` only composes them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
