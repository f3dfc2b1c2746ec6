"""Encoders with a decoder that attends to them: three kinds of attention layers in one model."""

from __future__ import annotations

from dataclasses import replace

from headwise.model.families.record import (
    Family,
    FeedForward,
    HandedOn,
    group_size,
    kv_heads,
    query_heads,
    query_width,
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


def _t5_mlp(layer: str) -> tuple[FeedForward, FeedForward]:
    """The plain MLP of T5 and the gated one of its version 1.1; ``layer`` is their place in a block."""
    norm, dense = f"{layer}.layer_norm", f"{layer}.DenseReluDense"
    plain = FeedForward(up=f"{dense}.wi", down=f"{dense}.wo", residual=norm, size="d_ff")
    return plain, replace(plain, gate=f"{dense}.wi_0", up=f"{dense}.wi_1")


_T5_ENCODER = Family(
    name="t5",
    model_types=("t5",),
    blocks="encoder.block.*",
    attention="layer.0.SelfAttention",
    query="q",
    key="k",
    value="v",
    output="o",
    head_dim="key_value_proj_dim",
    per_head={"relative_attention_bias.weight": 1},
    handed_on=HandedOn(argument="position_bias", table="relative_attention_bias", flag="has_relative_attention_bias"),
    mlp=_t5_mlp("layer.1")[0],
    other_mlp=_t5_mlp("layer.1")[1:],
    bookkeeping={"n_heads": query_heads, "inner_dim": query_width, "num_key_value_groups": group_size},
    config={"num_heads": query_heads},
)
_T5_DECODER = replace(
    _T5_ENCODER,
    blocks="decoder.block.*",
    causal=True,
    decoder=True,
    mlp=_t5_mlp("layer.2")[0],
    other_mlp=_t5_mlp("layer.2")[1:],
)
_T5_CROSS = replace(
    _T5_DECODER,
    blocks="decoder.block.*.layer.1",
    attention="EncDecAttention",
    causal=False,
    cross=True,
    per_head={},
    # Zeros, but of as many heads as the first layer has.
    handed_on=HandedOn(argument="position_bias"),
    mlp=None,
    other_mlp=(),
)
T5 = replace(_T5_ENCODER, also=(_T5_DECODER, _T5_CROSS))
"""Without biases and without scaling, with a head width of its own; a table of position biases per stack."""
