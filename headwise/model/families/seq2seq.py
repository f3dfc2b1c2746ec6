"""Encoders with a decoder that attends to them: three kinds of attention layers in one model."""

from __future__ import annotations

from dataclasses import replace

from headwise.model.families.record import (
    Family,
    FeedForward,
    group_size,
    kv_heads,
    query_heads,
)

_BART_ENCODER = Family(
    name="bart",
    model_types=("bart",),
    blocks="encoder.layers.*",
    attention="self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="out_proj",
    head_dim="head_dim",
    mlp=FeedForward(up="fc1", down="fc2", residual="fc1"),
    bookkeeping={"num_heads": query_heads, "num_key_value_groups": group_size},
)
_BART_DECODER = replace(_BART_ENCODER, blocks="decoder.layers.*", causal=True, decoder=True)
_BART_CROSS = replace(
    _BART_DECODER, attention="encoder_attn", causal=False, cross=True, residual="encoder_attn", mlp=None
)
BART = replace(_BART_ENCODER, also=(_BART_DECODER, _BART_CROSS))


_WHISPER_ENCODER = replace(
    _BART_ENCODER,
    name="whisper",
    model_types=("whisper",),
    positions="max_target_positions",
    mlp=FeedForward(up="fc1", down="fc2", residual="final_layer_norm"),
    # Read for the shape of keys and values only.
    bookkeeping={"num_heads": kv_heads, "num_key_value_groups": group_size},
    refuses={"cluster-heads": "its class gives keys as many heads as values, and clustered layers have fewer keys"},
)
_WHISPER_DECODER = replace(_WHISPER_ENCODER, blocks="decoder.layers.*", causal=True, decoder=True)
_WHISPER_CROSS = replace(
    _WHISPER_DECODER, attention="encoder_attn", causal=False, cross=True, residual="encoder_attn_layer_norm", mlp=None
)
WHISPER = replace(_WHISPER_ENCODER, also=(_WHISPER_DECODER, _WHISPER_CROSS))
"""Its encoder has no padding: every spectrogram has the same length, and no mask reaches the attention."""
