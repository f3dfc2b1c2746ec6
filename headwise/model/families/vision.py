"""Vision encoders."""

from __future__ import annotations

from dataclasses import replace

from headwise.model.families.record import (
    Family,
    FeedForward,
    group_size,
    head_width,
    query_heads,
)
from headwise.model.families.text import CLIP_TEXT

VIT = Family(
    name="vit",
    model_types=("vit",),
    blocks="layers.*",
    attention="attention",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="o_proj",
    head_dim="head_dim",
    patches=True,
    bidirectional=True,
    mlp=FeedForward(up="mlp.fc1", down="mlp.fc2", residual="layernorm_after", size="intermediate_size"),
    bookkeeping={"num_attention_heads": query_heads, "num_key_value_groups": group_size},
    config={"num_attention_heads": query_heads, "head_dim": head_width},
)

DEIT = replace(VIT, name="deit", model_types=("deit",))

DINOV2 = replace(
    VIT,
    name="dinov2",
    model_types=("dinov2",),
    blocks="encoder.layer.*",
    between="layer_scale1",
    mlp=FeedForward(up="mlp.fc1", down="mlp.fc2"),
    other_mlp=(FeedForward(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),),
)

CLIP_VISION = replace(
    CLIP_TEXT,
    name="clip-vision",
    model_types=("clip_vision_model",),
    patches=True,
    bidirectional=True,
    refuses={},
)
