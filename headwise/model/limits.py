"""What a model cannot have done to it: said by the fields of its family records."""

from __future__ import annotations

from collections.abc import Iterator

from headwise.model.view import AttentionView, ModelView


def limits(view: ModelView) -> tuple[str, ...]:
    """One sentence per limit, with the layers that it holds for where that is not all of them."""
    layers: dict[str, list[int]] = {}
    for layer in view.attention:
        for text in _refused(layer):
            layers.setdefault(text, []).append(layer.index)
    return tuple(
        text if len(where) == len(view.attention) else f"{text} (layers {', '.join(map(str, where))})"
        for text, where in layers.items()
    )


def _refused(layer: AttentionView) -> Iterator[str]:
    """Passes that would not be right here."""
    for name, reason in layer.family.refuses.items():
        yield f"{name}: refused, because {reason}"
