"""Save checkpoints, also those whose layers differ in their heads or neurons."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Collection, Mapping
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


def save_checkpoint(checkpoint: Checkpoint, view: ModelView, folder: Path, *, weights: bool = True) -> None:
    """Write the model as ``load_checkpoint`` reads it back, bit for bit.

    Args:
        checkpoint: the model, and where it comes from.
        view: its layers.
        folder: where to.
        weights: False writes everything else, for a model whose weights were never in memory together.

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
            sidecar["stock"] = _save_transformers(checkpoint, view, folder, weights=weights)
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


def _save_transformers(checkpoint: Checkpoint, view: ModelView, folder: Path, *, weights: bool) -> bool:
    """Write transformers' own files; returns whether the stock class can load them."""
    module: Any = checkpoint.module
    original = module.config
    stock = _stock_config(view, module)
    try:
        # The layers keep the config that they share with the model.
        module.config = copy.deepcopy(original) if stock is None else stock
        # The original format renames weights in a way that only the stock loader undoes.
        tensors = module.state_dict() if stock is None else _stock_tensors(module, stock)
        with quietly():
            if weights:
                module.save_pretrained(str(folder), state_dict=tensors, save_original_format=stock is not None)
            else:
                module.config.save_pretrained(str(folder))
    finally:
        module.config = original
    if checkpoint.folder is not None:
        copy_companions(checkpoint.folder, folder)
    return stock is not None


def _stock_config(view: ModelView, module: nn.Module) -> Any:
    """A config from which the stock class makes a model of these shapes; None where no config can say them."""
    entries = _changed_entries(view, module)
    if entries is None or (entries and not _accepts(module.config, entries)):
        return None
    config: Any = copy.deepcopy(module.config)
    for name, count in entries.items():
        setattr(config, name, count)
    tensors = module.state_dict()
    made = fresh(module, config).state_dict()
    fits = all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in made.items())
    return config if fits else None


def _changed_entries(view: ModelView, module: nn.Module) -> dict[str, Any] | None:
    """The entries of the config that have to change, with their new values; None where it has no such entries."""
    layout, stock = view.layout, ModelView.of(fresh(module)).layout
    heads, before = ([(len(entry.query), len(entry.kv)) for entry in which.attention] for which in (layout, stock))
    widths, old_widths = ([len(entry.neurons) for entry in which.mlp] for which in (layout, stock))
    entries: dict[str, Any] = {}
    if heads != before or any(entry.custom or entry.compressed for entry in layout.attention):
        counted = stock_entries(view)
        if not counted or not uniform(layout.attention) or not handed_alike(view):
            return None
        entries |= {name: count(layout.attention[0]) for name, count in counted.items()}
    if widths != old_widths:
        sizes = {mlp.record.size for mlp in view.mlp}
        if len(set(widths)) > 1 or len(sizes) > 1 or "" in sizes:
            return None
        entries[sizes.pop()] = widths[0]
    return entries


def _stock_tensors(module: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    """The tensors that the stock class has; layers that compute their own have more, which are copies then."""
    names = fresh(module, config).state_dict().keys()
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def _accepts(config: Any, entries: Mapping[str, Any]) -> bool:
    """Whether the config's class takes these numbers: some classes want one that divides the model width."""
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
    """Head counts and MLP widths in the schema of transformers' ``per_layer_config``."""
    found: dict[str, dict[str, int | list[int]]] = {
        str(layer.index): {name: count(layer.layout) for name, count in layer.family.config.items()}
        for layer in view.attention
    }
    index = {id(layer.block): str(layer.index) for layer in view.attention}
    for mlp in view.mlp:
        if mlp.record.size:
            found[index[id(mlp.block)]][mlp.record.size] = len(mlp.layout.neurons)
    return found


def copy_companions(source: Path, folder: Path, leave: Collection[str] = ()) -> None:
    """Tokenizer, processor and pooling files: everything beside the weights that decides how the model is fed.

    Args:
        source: from where.
        folder: to where; files that are there already stay.
        leave: names of further files that are not copied.
    """
    weights = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot"}
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        skip = (
            path.suffix in weights
            or path.name.endswith(".index.json")
            or path.name in leave
            or any(p.startswith(".") for p in relative.parts)
        )
        if path.is_file() and not skip and not (folder / relative).exists():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every shared tensor stored once more, which safetensors asks for."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
