"""One record per model family: where its attention layers are and how they store their heads.

This folder is the only place that knows attribute names of other people's models. A pass or an exporter that needs to
know more about a family is a reason to add a field to the record, never to branch on a model type elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from headwise.errors import UnsupportedModelError, did_you_mean
from headwise.model.families.decoders import (
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    OPT,
    PHI3,
    QWEN2,
    QWEN3,
)
from headwise.model.families.plain import plain_family
from headwise.model.families.record import Count, Family, FeedForward, HandedOn
from headwise.model.families.seq2seq import BART, T5, WHISPER
from headwise.model.families.text import ALBERT, BERT, CLIP_TEXT, DEBERTA_V2, DISTILBERT, ELECTRA, ROBERTA
from headwise.model.families.timm import timm_family
from headwise.model.families.vision import CLIP_VISION, DEIT, DINOV2, VIT

__all__ = ["FAMILIES", "Count", "Family", "FeedForward", "HandedOn", "family_of", "plain_family", "timm_family"]

FAMILIES: Mapping[str, Family] = {
    model_type: family
    for family in (
        *(BERT, ELECTRA, ROBERTA, DISTILBERT, ALBERT, DEBERTA_V2, CLIP_TEXT),
        *(VIT, DEIT, DINOV2, CLIP_VISION),
        *(GPT2, GPT_NEOX, OPT, LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3),
        *(BART, WHISPER, T5),
    )
    for model_type in family.model_types
}


def family_of(model_type: str) -> Family:
    """The record of a transformers ``model_type``.

    Raises:
        UnsupportedModelError: there is none; the message lists those that exist.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f'model type "{model_type}" has no family record',
            expected="one of: " + ", ".join(sorted(FAMILIES)),
            fix=did_you_mean(model_type, FAMILIES) + "  A new family is one record: see CONTRIBUTING.md",
        )
    return FAMILIES[model_type]
