"""The config of DeepSeek-V3, of which decoders with latent attention can be one."""

from __future__ import annotations

from typing import Any

import transformers

from headwise.model.layout import AttentionLayout

_SAME_FUNCTION = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps")
_SAME_USE = ("max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")


def deepseek_config(original: Any, layout: AttentionLayout) -> Any:
    """A dense model without a query latent, with one number more in the latent than a layer has, and with biases.

    Args:
        original: the config of a model with the same blocks except for their attention.
        layout: that of every attention layer.
    """
    return transformers.DeepseekV3Config(
        **{name: getattr(original, name) for name in (*_SAME_FUNCTION, *_SAME_USE)},
        num_attention_heads=len(layout.query),
        num_key_value_heads=len(layout.query),
        q_lora_rank=None,
        kv_lora_rank=layout.latent + 1,
        qk_rope_head_dim=layout.rotary,
        qk_nope_head_dim=layout.unrotated,
        v_head_dim=layout.head_dim,
        first_k_dense_replace=original.num_hidden_layers,
        num_mtp_layers=0,
        attention_bias=True,
        rope_interleave=False,
        rope_parameters={**original.rope_parameters},
        architectures=["DeepseekV3ForCausalLM"],
    )
