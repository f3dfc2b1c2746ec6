"""How long a sequence may be."""

from __future__ import annotations

from headwise.model.checkpoint import Checkpoint


def sequence_limit(checkpoint: Checkpoint) -> dict[str, int]:
    """``{"sequence": n}`` where the model has a longest sequence."""
    longest = checkpoint.longest_sequence()
    return {} if longest is None else {"sequence": longest}
