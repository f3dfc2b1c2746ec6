"""Passes: view + numbers -> edit plan. One file per method; a pass decides and never touches a tensor."""

from __future__ import annotations

from collections.abc import Mapping

from headwise.passes.base import Pass
from headwise.passes.prune_heads import PruneHeads
from headwise.passes.prune_mlp import PruneMlp
from headwise.passes.share_kv import ShareKVHeads

PASSES: Mapping[str, type[Pass]] = {cls.name: cls for cls in (PruneHeads, PruneMlp, ShareKVHeads)}
"""The only registry: name in a recipe -> pass."""
