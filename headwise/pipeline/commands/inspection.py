"""What a checkpoint holds: heads and neurons per layer, parameters, multiply-accumulates, kv bytes per token."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from headwise.gates.model_cost import kv_bytes_per_token, model_cost
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.limits import limits
from headwise.pipeline.shapes import sequence_limit


def inspect_checkpoint(ref: str, sequence: int = 128) -> dict[str, Any]:
    """Heads, neurons, costs and limits of a checkpoint as plain data.

    ``macs`` is None, with the reason in ``macs_note``, where the inputs cannot be made up from the config.
    """
    checkpoint = load_checkpoint(ref)
    view = checkpoint.view()
    inputs, note = _dummy_inputs(checkpoint, sequence)
    cost = None if inputs is None else model_cost(view, inputs)
    mlp_of = {id(mlp.block): mlp.index for mlp in view.mlp}
    layers = [
        {
            "layer": layer.index,
            "path": layer.path,
            "query_heads": len(layer.layout.query),
            "kv_heads": len(layer.layout.kv),
            "head_dim": layer.layout.head_dim,
            "runs": layer.runs,
            "query": list(layer.layout.query),
            "kv": list(layer.layout.kv),
            "represented": list(layer.layout.represented),
            "latent": layer.layout.latent,
            "owner": layer.layout.owner,
            "mlp": mlp_of.get(id(layer.block)),
        }
        for layer in view.attention
    ]
    mlps = [
        {"mlp": mlp.index, "path": mlp.path, "neurons": len(mlp.layout.neurons), "width": mlp.layout.width}
        for mlp in view.mlp
    ]
    return {
        "checkpoint": checkpoint.source,
        "kind": checkpoint.kind,
        "model_type": checkpoint.model_type,
        "family": ", ".join(sorted({layer.family.name for layer in view.attention})),
        "digest": checkpoint.digest,
        "layers": layers,
        "mlps": mlps,
        "parameters": sum(p.numel() for p in view.module.parameters()),
        "macs": None if cost is None else cost.macs,
        "attention_macs": None if cost is None else cost.attention_macs,
        "macs_note": note,
        "kv_bytes_per_token": kv_bytes_per_token(view),
        "kv_dtype": "float16",
        "limits": list(limits(view)),
    }


def _dummy_inputs(checkpoint: Checkpoint, sequence: int) -> tuple[dict[str, torch.Tensor] | None, str]:
    """One row of made-up inputs for a transformers model, and what the counts are for."""
    config: Any = getattr(checkpoint.module, "config", None)
    images: Any = getattr(config, "vision_config", config)
    names = checkpoint.input_names()
    inputs: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    length = min(sequence, sequence_limit(checkpoint).get("sequence", sequence))
    ids = torch.ones(1, length, dtype=torch.long)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):  # some classifiers read the state of this token
        ids[:, -1] = end
    if "input_ids" in names:
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        notes.append(f"one sequence of {length} tokens")
    if "pixel_values" in names and hasattr(images, "image_size"):
        size, channels = images.image_size, getattr(images, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(1, channels, height, width)
        notes.append(f"one {height} x {width} image")
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions  # the second convolution takes every other frame
        inputs["input_features"] = torch.zeros(1, config.num_mel_bins, frames)
        notes.append(f"one spectrogram of {frames} frames")
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids
        notes.append(f"{length} tokens for the decoder")
    if not inputs:
        return None, "a plain module's input shapes are not known here; `headwise compress` counts them from its data"
    return inputs, " and ".join(notes)


def inspection_table(found: dict[str, Any]) -> RenderableType:
    """The same for a terminal."""
    table = Table("layer", Column("module", no_wrap=True), "query heads", "kv heads", "head_dim", "neurons")
    for layer in found["layers"]:
        neurons = "none" if layer["mlp"] is None else _neurons(found["mlps"][layer["mlp"]])
        counts = (layer["query_heads"], _kv_heads(layer), layer["head_dim"], neurons)
        runs = f" ({layer['runs']} runs)" if layer["runs"] > 1 else ""
        table.add_row(str(layer["layer"]), layer["path"] + runs, *map(str, counts))
    macs = (
        "not counted" if found["macs"] is None else f"{found['macs']:,}, of these attention {found['attention_macs']:,}"
    )
    kv = f"{found['kv_bytes_per_token']:,} ({found['kv_dtype']})" if found["kv_bytes_per_token"] else "none: not causal"
    lines = [
        f"{found['checkpoint']}: {found['model_type']} ({found['kind']}), family {found['family']}",
        f"parameters          {found['parameters']:,}",
        f"MACs                {macs} ({found['macs_note']})",
        f"KV bytes per token  {kv}",
    ]
    told = [Padding(Text(f"- {limit}"), (0, 0, 0, 2)) for limit in found["limits"]]
    lines += ["limits"] if told else []
    return Group(Text(lines[0], style="bold"), table, *map(Text, lines[1:]), *told)


def _kv_heads(layer: dict[str, Any]) -> str:
    """``12``, or where keys and values come from instead of projections of the layer's own input."""
    latent = f" from a latent of {layer['latent']}" if layer["latent"] else ""
    owner = "" if layer["owner"] is None else f" of layer {layer['owner']}"
    return f"{layer['kv_heads']}{latent}{owner}"


def _neurons(mlp: dict[str, Any]) -> str:
    """``1024``, or ``768 of 1024`` where neurons were removed."""
    return str(mlp["neurons"]) if mlp["neurons"] == mlp["width"] else f"{mlp['neurons']} of {mlp['width']}"
