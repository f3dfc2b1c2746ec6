"""Passes: view + numbers -> edit plan. One file per method; a pass decides and never touches a tensor."""

from __future__ import annotations

from collections.abc import Mapping

from headwise.passes.base import Pass
from headwise.passes.cluster_heads import ClusterHeadsPass
from headwise.passes.latent_kv import LatentKVPass
from headwise.passes.prune import Prune
from headwise.passes.prune_heads import PruneHeads
from headwise.passes.prune_mlp import PruneMlp
from headwise.passes.prune_tokens import PruneTokens
from headwise.passes.quantize import Quantize
from headwise.passes.share_kv import ShareKVHeads
from headwise.passes.share_layers import ShareLayersPass
from headwise.passes.stream_heads import StreamHeadsPass

PASSES: Mapping[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        PruneHeads,
        PruneMlp,
        Prune,
        ShareKVHeads,
        ClusterHeadsPass,
        LatentKVPass,
        ShareLayersPass,
        PruneTokens,
        StreamHeadsPass,
    )
}
"""Passes that edit the model: name in a recipe -> pass."""

STEPS: Mapping[str, type[Pass] | type[Quantize]] = {**PASSES, Quantize.name: Quantize}
"""Everything that can stand under ``passes`` in a recipe; quantization works on the exported graph and comes last."""
