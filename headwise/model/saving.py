"""Save checkpoints, also those whose layers differ in their head counts."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from headwise.artifacts import storage_error, write_atomic
from headwise.model.checkpoint import SIDECAR, WEIGHTS, Checkpoint
from headwise.model.families import FAMILIES, Count
from headwise.model.handed import handed_alike
from headwise.model.layout import uniform
from headwise.model.sources import constructor_arguments, fresh, quietly
from headwise.model.view import ModelView

_SCHEMA = 1


def save_checkpoint(checkpoint: Checkpoint, view: ModelView, folder: Path) -> None:
    """Write the model as ``load_checkpoint`` reads it back, bit for bit.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    layout = view.layout
    sidecar: dict[str, Any] = {
        "schema": _SCHEMA,
        "kind": checkpoint.kind,
        "families": sorted({layer.family.name for layer in view.attention}),
        "layout": layout.to_json(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint.kind == "transformers":
            sidecar["stock"] = _save_transformers(checkpoint, view, folder)
            sidecar["arguments"] = constructor_arguments(checkpoint.module)
            if not sidecar["stock"] and stock_entries(view):
                # In config.json it would make transformers refuse every reader of the config, the tokenizer included.
                sidecar["per_layer_config"] = _per_layer_config(view)
        else:
            sidecar["factory"] = checkpoint.factory
            save_file(_tensors(checkpoint.module), str(folder / WEIGHTS))
    except OSError as error:
        raise storage_error(error, folder) from error
    write_atomic(folder / SIDECAR, json.dumps(sidecar, indent=2))


def _save_transformers(checkpoint: Checkpoint, view: ModelView, folder: Path) -> bool:
    """Write transformers' own files; returns whether the stock class can load them."""
    module, layout, counted = checkpoint.module, view.layout, stock_entries(view)
    counts = [(len(v.layout.query), len(v.layout.kv)) for v in ModelView.of(fresh(module)).attention]
    special = any(entry.clustered or entry.compressed for entry in layout.attention)
    unchanged = not special and counts == [(len(entry.query), len(entry.kv)) for entry in layout.attention]
    config = module.config
    entries = {name: count(next(iter(layout.attention))) for name, count in counted.items()}
    stock = unchanged or (uniform(layout.attention) and _accepts(config, entries) and handed_alike(view))
    saved = copy.deepcopy(config)
    if stock and not unchanged:
        for name, count in entries.items():
            setattr(saved, name, count)
    try:
        # The layers keep the config that they share with the model.
        module.config = saved
        # The original format renames weights in a way that only the stock loader undoes.
        tensors = _stock_tensors(module) if stock else module.state_dict()
        with quietly():
            module.save_pretrained(  # type: ignore[operator]
                str(folder), state_dict=tensors, save_original_format=stock
            )
    finally:
        module.config = config
    if checkpoint.folder is not None:
        _copy_companions(checkpoint.folder, folder)
    return stock


def _stock_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that the stock class has; layers that compute their own have more, which are copies then."""
    names = fresh(module).state_dict().keys()
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def _accepts(config: Any, entries: Mapping[str, Any]) -> bool:
    """Whether the config's class takes these head counts: some classes want one that divides the model width."""
    if not entries:
        return False
    try:
        type(config).from_dict({**config.to_dict(), **entries})
    except Exception:  # somebody else's checks
        return False
    return True


def stock_entries(view: ModelView) -> Mapping[str, Count]:
    """Entries of the model's own config that can express head counts, where all layers are of one family.

    A model of several towers has a config of configs, which has no entry for heads itself.
    """
    config: Any = view.module.config
    if config.model_type not in FAMILIES:
        return {}
    first, *rest = [layer.family.config for layer in view.attention]
    grouped = any(layer.group > 1 for layer in view.layout.attention)
    if any(config != first for config in rest) or (grouped and "num_key_value_heads" not in first):
        return {}
    return first


def _per_layer_config(view: ModelView) -> dict[str, dict[str, int | list[int]]]:
    """Head counts in the schema of transformers' ``per_layer_config``."""
    return {
        str(layer.index): {name: count(layer.layout) for name, count in layer.family.config.items()}
        for layer in view.attention
    }


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, processor and pooling files: everything beside the weights that decides how the model is fed."""
    weights = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot"}
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        skip = (
            path.suffix in weights
            or path.name.endswith(".index.json")
            or any(p.startswith(".") for p in relative.parts)
        )
        if path.is_file() and not skip and not (folder / relative).exists():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every shared tensor stored once more, which safetensors asks for."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
