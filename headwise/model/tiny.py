"""A model of a checkpoint's architecture with few layers and random weights: the same classes, heads and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from headwise.errors import CheckpointError
from headwise.model.checkpoint import SIDECAR, WEIGHTS, Checkpoint, load_checkpoint
from headwise.model.saving import save_checkpoint
from headwise.model.sources import constructor_arguments, fresh_class, quietly

LAYERS = 2
_COUNTS = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
    *("n_layer", "n_layers"),
)
_STAGES = frozenset({"stage_names", "out_features", "out_indices", "_out_features", "_out_indices"})
_SEED = 0


def tiny_checkpoint(ref: str | Path, folder: Path) -> Checkpoint:
    """Write and load a model with the config of a checkpoint, but two layers, or one of each kind, and random weights.

    Args:
        ref: a directory of transformers or a hub id, of which only config, tokenizer and image processor are read; or
            ``module:factory`` of a plain module that is small already, which is taken as it is.
        folder: for the new checkpoint.

    Raises:
        CheckpointError: the layers of the model cannot be left out.
    """
    source = Path(ref)
    if not source.is_dir() and ":" in str(ref):
        return load_checkpoint(ref)
    if (source / SIDECAR).exists():
        raise CheckpointError(
            f"{ref} was written by headwise, and its layers may differ from what a config can say",
            expected="with --tiny, a directory of transformers, a hub id, or module:factory of a small module",
            fix="name the checkpoint that it was made from; for a plain module, a factory with two layers",
        )
    with quietly():
        config = _read_config(str(ref))
        values = shortened(config.to_dict())
        config = transformers.AutoConfig.for_model(**values)
        cls = fresh_class(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            module = cls(config)
            if "add_pooling_layer" in constructor_arguments(module) and not _has_pooler(source):
                module = cls(config, add_pooling_layer=False)
    home = source if source.is_dir() else None
    made = Checkpoint(module=module.float().eval(), source=str(ref), kind="transformers", digest="", folder=home)
    save_checkpoint(made, made.view(), folder)
    found = load_checkpoint(folder)
    found.source, found.processor = str(ref), str(ref)
    return found


def shortened(values: dict[str, Any]) -> dict[str, Any]:
    """A config, and those inside it, with two layers: the first two, or the first of each of two kinds.

    Lists with an entry per layer keep the entries of these layers.
    """
    found: dict[str, Any] = {
        key: shortened(entry) if isinstance(entry, dict) else entry for key, entry in values.items()
    }
    counts: dict[str, int] = {key: found[key] for key in _COUNTS if isinstance(found.get(key), int)}
    if not counts:
        return found
    kinds = list(found.get("layer_types") or [])
    firsts = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    kept = firsts[:LAYERS] if len(firsts) >= LAYERS else range(LAYERS)
    for key, entry in found.items():
        if isinstance(entry, list) and "layer" in key and len(entry) in counts.values():
            found[key] = [entry[index] for index in kept if index < len(entry)]
    # The names of stages are made from the number of layers.
    found = {key: entry for key, entry in found.items() if key not in _STAGES}
    return found | {key: min(count, LAYERS) for key, count in counts.items()}


def _read_config(ref: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(ref)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{ref} has no config that transformers can read: {str(error).strip().splitlines()[0]}",
            expected="with --tiny, a directory of transformers, a hub id, or module:factory of a small module",
            fix="check the name; a hub id needs the network or a filled cache",
        ) from error


def _has_pooler(folder: Path) -> bool:
    """Whether the trained weights have a pooler; sentence encoders are often saved without one."""
    path = folder / WEIGHTS
    if not path.exists():
        return True
    with safe_open(str(path), "pt") as file:
        return any("pooler." in name for name in file.keys())  # noqa: SIM118 (no mapping)
