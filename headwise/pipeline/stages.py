"""The stages of a run. Each one makes its artifact or finds it on disk, measures it, and asks its gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise.artifacts import Artifact
from headwise.calibration.stats import Stat
from headwise.device.cuda import gpu
from headwise.errors import MachineError
from headwise.export.decoder import DECODE
from headwise.export.graph import copy_graph, graph_inputs
from headwise.export.opening import open_runner
from headwise.export.profiles import engine_shapes
from headwise.export.quantize import Promise
from headwise.export.runners import TorchRunner
from headwise.export.targets import Target, check_target, resolve_target
from headwise.export.tensorrt import build_engine
from headwise.model.cache import prunes_prompts
from headwise.model.saving import save_checkpoint
from headwise.passes.base import run_pass
from headwise.pipeline.companions import pass_on
from headwise.pipeline.exporting import Exporter
from headwise.pipeline.gatekeeper import Gatekeeper
from headwise.pipeline.graphs import GRAPH, MODEL, Graph, StoredModel, judged
from headwise.pipeline.monitor import Monitor, Steps
from headwise.pipeline.quantize.stage import Quantizer
from headwise.pipeline.recipe import Recipe, engine_stage
from headwise.pipeline.results import Results, StageEntry
from headwise.pipeline.shapes import sequence_limit
from headwise.pipeline.speeds import in_words
from headwise.pipeline.store import Make, Store, installed_version, versions
from headwise.pipeline.timing import StoredTable, Timing
from headwise.pipeline.workspace import Workspace

ENGINE, DECODE_ENGINE = "model.engine", "decode.engine"


def check_targets(recipe: Recipe) -> None:
    """Raise TargetError for a target that cannot do what the recipe asks of it, before any work is done."""
    schemes = frozenset[str]() if recipe.quantize is None else recipe.quantize.schemes()
    for target in recipe.targets:
        check_target(resolve_target(target), recipe.export.precision, schemes)


class Stages:
    """Makes the stages of a run; ``run.py`` puts them in order."""

    def __init__(self, workspace: Workspace, results: Results, store: Store, monitor: Monitor) -> None:
        self.workspace = workspace
        self.results = results
        self.store = store
        self.monitor = monitor
        self.gatekeeper = Gatekeeper(workspace, results, store, monitor)
        self.exporter = Exporter(workspace, self.gatekeeper, monitor)
        self.timing = Timing(workspace, monitor)

    def baseline(self) -> tuple[StoredModel, Path]:
        """Measure the untouched model and export it, so that costs are compared graph with graph.

        Returns:
            The model, and the path of its fp32 graph.
        """
        checkpoint = self.workspace.checkpoint
        with self.results.stage("baseline") as entry:
            key = {"checkpoint": checkpoint.digest, **self.exporter.key()}
            # Measured first: labels that do not fit the outputs show before the time of an export is spent.
            measurements = self.gatekeeper.measure_reference(entry)
            artifact = self._artifact(entry, key, lambda folder: self.exporter.export(checkpoint, folder))
            entry.cost.update(artifact.info["graph"])
            self.gatekeeper.judge(entry, measurements, can_roll_back=False)
        return StoredModel(checkpoint.digest, None, checkpoint), artifact.path / GRAPH

    def apply_pass(self, index: int, model: StoredModel) -> StoredModel:
        """Run one pass on a copy of the model; after a rollback the model goes on as it was."""
        recipe = self.workspace.recipe
        pass_ = recipe.edits[index]
        with self.results.stage(recipe.stage_names()[1 + index][0]) as entry:
            timed = self._latency_table(entry, model) if pass_.timed else None
            key = {
                "parent": model.digest,
                "latency": None if timed is None else timed.digest,
                "pass": pass_.name,
                "options": pass_.model_dump(mode="json"),
                "calibration": self.workspace.calibration_digest,
                "task": recipe.task.model_dump(mode="json", exclude={"data"}),
                "seed": recipe.seed,
                "batch_size": recipe.batch_size,
                "sequence": self.workspace.sequence if Stat.MACS in pass_.needs() else None,
                "checkpoint": self.workspace.checkpoint.digest,
                **versions("torch"),
            }
            artifact = self._artifact(entry, key, lambda folder: self._apply(index, model, timed, folder))
            entry.record = dict(artifact.info["record"])
            edited = StoredModel(artifact.digest, artifact.path / MODEL, self.workspace.checkpoint)
            measurements = self.gatekeeper.measure(
                entry,
                artifact.digest,
                lambda: TorchRunner(edited.checkpoint.module),
                "torch",
                cost=lambda: self.gatekeeper.model_cost(edited.checkpoint),
            )
            entry.cost["file_bytes"] = sum(path.stat().st_size for path in artifact.path.rglob("*.safetensors"))
            used = self.gatekeeper.judge(entry, measurements, can_roll_back=True)
        return edited if used else model

    def export(self, model: StoredModel, dense: Path) -> Graph:
        """Export to ONNX; the graph has to give what the module gives, at several shapes."""
        with self.results.stage("onnx") as entry:
            key = {"parent": model.digest, **self.exporter.key()}
            artifact = self._artifact(entry, key, lambda folder: self.exporter.export(model.checkpoint, folder))
            entry.record = {
                key: artifact.info[key] for key in ("parity", "nodes", "forms", "decode") if key in artifact.info
            }
            graph = Graph(
                path=artifact.path / GRAPH,
                digest=artifact.digest,
                precision="fp32",
                dense=dense,
                scopes=tuple(artifact.info["scopes"]),
            )
            self._judge_graph(entry, artifact, graph, can_roll_back=False)
        return graph

    def convert(self, graph: Graph) -> Graph:
        """Write the graph in the recipe's precision; after a rollback the engines are built from fp32."""
        spec = self.workspace.recipe.export
        if spec.precision == graph.precision:
            return graph
        with self.results.stage(spec.precision) as entry:
            key = {"parent": graph.digest, "precision": spec.precision, "keep_io": spec.keep_io, **versions("onnx")}
            artifact = self._artifact(entry, key, lambda folder: self.exporter.convert(graph, folder))
            path = artifact.path / GRAPH
            converted = replace(graph, path=path, digest=artifact.digest, precision=spec.precision)
            used = self._judge_graph(entry, artifact, converted, can_roll_back=True, single=converted.decode)
        return converted if used else graph

    def quantize(self, source: Graph, body: Graph) -> Graph:
        """Quantize the fp32 graph; the rest has the precision of ``body``, which a rollback goes back to."""
        options = self.workspace.recipe.quantize
        if options is None:
            return body
        quantizer = Quantizer(self.workspace, self.store, self.monitor, source)
        with self.results.stage(options.name) as entry:
            key = {
                **quantizer.key(options),
                "precision": body.precision,
                "keep_io": self.workspace.recipe.export.keep_io,
            }

            def make(folder: Path) -> dict[str, Any]:
                pass_on(source.path.parent, folder)
                made = quantizer.for_tensorrt(options, body.precision, folder)
                cost = self.exporter.cost(judged(folder / GRAPH), source.scopes)
                own = {"file_bytes": (folder / GRAPH).stat().st_size, **made["cost"]}
                return {**made, "graph": {**cost, **own}}

            artifact = self._artifact(entry, key, make)
            entry.record = dict(artifact.info["record"])
            promises, single_promises = (
                tuple(Promise(**promise) for promise in artifact.info[key]) for key in ("promises", "single_promises")
            )
            quantized = replace(
                body,
                path=artifact.path / GRAPH,
                digest=artifact.digest,
                promises=promises,
                single_promises=single_promises,
            )
            # Its speed on a CPU says nothing: Q/DQ nodes are for TensorRT.
            single = quantized.decode
            used = self._judge_graph(entry, artifact, quantized, can_roll_back=True, timed=False, single=single)
        return quantized if used else body

    def deploy(self, source: Graph, name: str) -> None:
        """Make the graph that ONNX Runtime runs on a CPU: in int8 where the recipe quantizes, else the fp32 graph."""
        options = self.workspace.recipe.quantize
        quantizer = Quantizer(self.workspace, self.store, self.monitor, source)
        with self.results.stage(engine_stage(name)) as entry:
            key = {"parent": source.digest} if options is None else quantizer.key(options)

            def make(folder: Path) -> dict[str, Any]:
                pass_on(source.path.parent, folder)
                if options is None:
                    copy_graph(source.path, folder / GRAPH)
                    if source.decode is not None:
                        copy_graph(source.decode, folder / DECODE)
                    made: dict[str, Any] = {}
                else:
                    made = quantizer.for_cpu(options, folder)
                cost = self.exporter.cost(folder / GRAPH, source.scopes)
                return {**made, "graph": {**cost, **made.get("cost", {})}}

            artifact = self._artifact(entry, key, make)
            if options is not None:
                entry.record = dict(artifact.info["record"])
            deployed = replace(source, path=artifact.path / GRAPH, digest=artifact.digest)
            # Without quantization it is the graph that was compared with torch.
            single = None if options is None else deployed.decode
            self._judge_graph(entry, artifact, deployed, can_roll_back=False, single=single)

    def build(self, graph: Graph, name: str) -> None:
        """Build the engine for one target, and run it through the task where its GPU is."""
        target, spec = resolve_target(name), self.workspace.recipe.export
        with self.results.stage(engine_stage(name)) as entry:
            promised = {promise.scheme for promise in (*graph.promises, *graph.single_promises)}
            check_target(target, graph.precision, promised)
            shapes = engine_shapes(graph.path, spec, sequence_limit(self.workspace.checkpoint))
            single = shapes["decode"] if graph.decode is not None else {}
            if single:
                shapes = {**shapes, "decode": {}}
            key = {
                "parent": graph.digest,
                "target": [target.sm, target.runtime],
                **shapes,
                **({"single": single} if single else {}),
                "workspace_mb": spec.workspace_mb,
                "builder": installed_version(target.runtime),
            }

            def make(folder: Path) -> dict[str, Any]:
                made = build_engine(graph.path, folder / ENGINE, target, **shapes, workspace_mb=spec.workspace_mb)
                if graph.decode is None:
                    return {"engine": made.to_json()}
                out, memory = folder / DECODE_ENGINE, spec.workspace_mb
                decode = build_engine(graph.decode, out, target, profiles=single, workspace_mb=memory)
                return {"engine": {**made.to_json(), "decode_engine": decode.to_json()}}

            self.monitor.work("build", 0)
            try:
                artifact = self._artifact(entry, key, make)
            except MachineError as error:
                self.gatekeeper.could_not_run(entry, f"{error.found}; {error.fix}")
                return
            entry.engine = dict(artifact.info["engine"])
            entry.cost = {"file_bytes": (artifact.path / ENGINE).stat().st_size}
            kernels = self.gatekeeper.kernels(entry, graph)
            missing = _why_not_here(target)
            if missing:
                self.gatekeeper.could_not_run(entry, missing, kernels)
                return
            measurements = self.gatekeeper.measure(
                entry, artifact.digest, lambda: open_runner(artifact.path / ENGINE), "tensorrt"
            )
            self.gatekeeper.judge(entry, measurements, kernels, can_roll_back=False)

    def _artifact(self, entry: StageEntry, key: dict[str, Any], make: Make) -> Artifact:
        artifact, why = self.store.get(entry.folder, entry.kind, key, make)
        entry.made(why)
        self.results.keep(entry, artifact)
        return artifact

    def _judge_graph(
        self,
        entry: StageEntry,
        artifact: Artifact,
        graph: Graph,
        *,
        can_roll_back: bool,
        timed: bool = True,
        single: Path | None = None,
    ) -> bool:
        entry.cost = dict(artifact.info["graph"])
        if not artifact.info.get("runs_on_cpu", True):
            reason = "ONNX Runtime has no bf16 kernels for the CPU; the gate of the engine judges this graph"
            self.gatekeeper.could_not_run(entry, reason)
            return True
        costs = (self.results.stages[0].cost, entry.cost)

        def measure_cost() -> dict[str, Any]:
            return {"latency": self.gatekeeper.latency(graph.dense, graph.path, costs)} if timed else {}

        measurements = self.gatekeeper.measure(entry, artifact.digest, graph.runner, "onnxruntime", cost=measure_cost)
        if timed:
            gate = self.workspace.recipe.gate.for_stage(entry.name, entry.kind)
            entry.cost["latency"] = entry.cost["latency"] | in_words(entry.cost["latency"], *costs, gate.confidence)
        # Behind pruned prompts both graphs have read the texts together.
        if single is not None and prunes_prompts(graph_inputs(single)):
            single = None
        others = () if single is None else self.gatekeeper.judge_single(entry, artifact.digest, single)
        return self.gatekeeper.judge(entry, measurements, others, can_roll_back=can_roll_back)

    def _latency_table(self, entry: StageEntry, model: StoredModel) -> StoredTable:
        key = {"parent": model.digest, **self.exporter.key()}
        found = self.timing.stored(model.checkpoint.copy().view(), self.store, f"{entry.folder}.latency", key)
        entry.made(found.why)
        return found

    def _apply(self, index: int, model: StoredModel, timed: StoredTable | None, folder: Path) -> dict[str, Any]:
        workspace = self.workspace
        checkpoint = model.checkpoint.copy()
        view = checkpoint.view()
        record = run_pass(
            workspace.recipe.edits[index],
            view,
            workspace.checkpoint.copy().view(),
            workspace.task,
            workspace.calibration,
            seed=workspace.recipe.seed,
            batch_size=workspace.recipe.batch_size,
            sequence=workspace.sequence,
            latency=None if timed is None else timed.table,
            progress=Steps(self.monitor, len(workspace.calibration)),
        ).to_json()
        if timed is not None:
            record["latency"] = self.timing.outcome(timed.table, model.checkpoint.copy().view(), view)
        save_checkpoint(checkpoint, view, folder / MODEL)
        return {"record": record}


def _why_not_here(target: Target) -> str:
    """Why an engine for ``target`` cannot run on this machine; empty where it can."""
    found = gpu()
    if found is None:
        return "no GPU"
    if found.sm != target.sm:
        return f"{found.name} is sm{found.sm}, the engine is for sm{target.sm}"
    return ""
