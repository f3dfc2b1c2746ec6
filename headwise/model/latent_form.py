"""How latent attention computes: keys and values of all heads, or attention on the latents as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Form = Literal["auto", "absorbed", "unabsorbed"]
_form: ContextVar[Form] = ContextVar("latent_form", default="auto")


@contextmanager
def latent_form(name: Form) -> Iterator[None]:
    """Choose how latent attention computes while the block runs.

    ``unabsorbed`` computes keys and values of all heads from the latents: the least work for many query tokens.
    ``absorbed`` moves that into queries and outputs, so that attention reads the latents as they are: the least work
    for one query token and many latents. ``auto`` absorbs where one token is added to a cache.
    """
    token = _form.set(name)
    try:
        yield
    finally:
        _form.reset(token)


def chosen_form(*, single: bool) -> Form:
    """The form to compute in; ``single``: the call adds one token to a cache."""
    form = _form.get()
    if form == "auto":
        form = "absorbed" if single else "unabsorbed"
    return form
