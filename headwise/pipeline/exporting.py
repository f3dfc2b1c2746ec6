"""Graphs of a run: exported from a model, written in another precision, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headwise.export.decoder import DECODE, export_decode, export_model
from headwise.export.graph import graph_inputs
from headwise.export.onnx import ExportInfo
from headwise.export.ports import first_call
from headwise.export.precision import convert_precision
from headwise.gates.cost import graph_cost
from headwise.model.attend import form
from headwise.model.checkpoint import Checkpoint
from headwise.model.view import ModelView
from headwise.pipeline.companions import pass_on, write_companions
from headwise.pipeline.forms import FORMS, choose_form
from headwise.pipeline.gatekeeper import Gatekeeper
from headwise.pipeline.graphs import GRAPH, Graph
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.store import versions
from headwise.pipeline.workspace import Workspace


class Exporter:
    """Fills the folders of the stages that make graphs; each method returns what the manifest shall remember."""

    def __init__(self, workspace: Workspace, gatekeeper: Gatekeeper, monitor: Monitor) -> None:
        self.workspace = workspace
        self.gatekeeper = gatekeeper
        self.monitor = monitor

    def key(self) -> dict[str, Any]:
        """What an export depends on, beside the model."""
        examples, spec = self.workspace.examples, self.workspace.recipe.export
        sequence = None if spec.sequence is None else spec.sequence.opt
        axes = {name: list(varying) for name, varying in examples.dynamic_axes().items()}
        # Only clustered layers have forms, and only their choice depends on there being engines.
        clustered = any(entry.name == "cluster-heads" for entry in self.workspace.recipe.passes)
        layout = self.workspace.checkpoint.layout
        clustered |= layout is not None and any(layer.clustered for layer in layout.attention)
        forms = [spec.clusters, bool(self.workspace.recipe.targets)] if clustered else []
        sample = {"sample": examples.digest, "axes": axes, "sequence": sequence}
        made = {"opset": spec.opset, "clusters": forms, "cache": spec.cache, "decode": spec.decode}
        return {**made, **sample, **versions("onnx")}

    def export(self, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
        """Export a model; one with clustered layers in both forms, of which one goes on."""
        self.monitor.work("export", 0)
        write_companions(self.workspace.checkpoint, checkpoint.folder, folder)
        view = checkpoint.copy().view()
        if not any(layer.clustered for layer in view.layout.attention):
            return self._export_form(view, folder / GRAPH)
        recipe = self.workspace.recipe
        made = {}
        for name in FORMS:
            with form(name):
                made[name] = self._export_form(view, folder / name / GRAPH)
        choice = choose_form(
            {name: info["graph"]["macs"] for name, info in made.items()},
            self.gatekeeper.compare({name: folder / name / GRAPH for name in made}),
            wanted=recipe.export.clusters,
            engines=bool(recipe.targets),
        )
        for path in (folder / choice.form).iterdir():
            path.rename(folder / path.name)
        return {**made[choice.form], "forms": choice.to_json()}

    def _export_form(self, view: ModelView, path: Path) -> dict[str, Any]:
        scopes = [layer.path for layer in view.attention]
        path.parent.mkdir(exist_ok=True)
        given = self.workspace.examples, path, self.workspace.recipe.export
        info = export_model(view, *given)
        decode = export_decode(view, *given)
        return {
            "graph": self.cost(path, scopes),
            **_exactness(info),
            "scopes": scopes,
            **({} if decode is None else {"decode": _exactness(decode)}),
        }

    def convert(self, graph: Graph, folder: Path) -> dict[str, Any]:
        """Write a graph in the precision of the recipe."""
        self.monitor.work("convert", 0)
        pass_on(graph.path.parent, folder)
        spec = self.workspace.recipe.export
        info = convert_precision(graph.path, folder / GRAPH, spec.precision, keep_io=spec.keep_io)
        if graph.decode is not None:
            convert_precision(graph.decode, folder / DECODE, spec.precision, keep_io=spec.keep_io)
        cost = self.cost(folder / GRAPH, graph.scopes)
        return {"graph": cost, "runs_on_cpu": info.runs_on_cpu, "casts": info.casts}

    def cost(self, path: Path, scopes: Sequence[str]) -> dict[str, int]:
        """Work and size of a graph, counted for one sample; ``scopes`` are the paths of the attention layers."""
        row = first_call(self.gatekeeper.cost_row(), graph_inputs(path))
        shapes = {name: array.shape for name, array in row.items()}
        cost = graph_cost(path, shapes, attention_scopes=scopes)
        return {"macs": cost.macs, "attention_macs": cost.attention_macs, "file_bytes": cost.file_bytes}


def _exactness(info: ExportInfo) -> dict[str, Any]:
    """What the report says of a graph that was exported."""
    return {"parity": [p._asdict() for p in info.parity], "nodes": dict(info.nodes)}
