"""Measures what a stage made against the untouched model, and asks the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise.calibration.shapes import cost_row
from headwise.export.graph import graph_inputs
from headwise.export.listing import ListingSummary
from headwise.export.ports import first_call
from headwise.export.runners import OrtRunner, Runner, TorchRunner
from headwise.gates.cost import device_name, latency
from headwise.gates.judge import Verdict, judge, judge_all, not_run
from headwise.gates.kernels import judge_kernels
from headwise.gates.measure import (
    SAMPLES,
    Measurement,
    Predictions,
    load_measurements,
    measure,
    predict,
    save_measurements,
)
from headwise.gates.model_cost import model_cost
from headwise.gates.slowness import Sizes, operator_times, why_not_faster
from headwise.gates.speed import Speedup, speed_not_run
from headwise.model.attend import Form
from headwise.model.checkpoint import Checkpoint
from headwise.model.forward import to_torch
from headwise.pipeline.graphs import Graph, judged
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.results import Results, StageEntry
from headwise.pipeline.speeds import deployed, is_smaller, judge_stage
from headwise.pipeline.store import Store, versions
from headwise.pipeline.tiny import NOT_JUDGED, judge_structure
from headwise.pipeline.workspace import Workspace

Cost = Callable[[], dict[str, Any]]
SINGLE = "single tokens"
"""What stands behind the name of an output of a decoder's second graph."""
_PREDICTIONS = "predictions.npz"


class Gatekeeper:
    """Holds the untouched model's predictions; every stage is compared with these, on the same samples."""

    def __init__(self, workspace: Workspace, results: Results, store: Store, monitor: Monitor) -> None:
        self.workspace = workspace
        self.results = results
        self.store = store
        self.monitor = monitor
        self.reference = Predictions(values={})
        self.reference_digest = ""

    def measure_reference(self, entry: StageEntry) -> Sequence[Measurement]:
        """Predict with the untouched model; compared with itself, it shows whether the data can judge at all."""
        checkpoint = self.workspace.checkpoint

        def make(folder: Path) -> dict[str, Any]:
            with TorchRunner(checkpoint.module) as runner:
                self._predict(runner).save(folder / _PREDICTIONS)
            return {"cost": self.model_cost(checkpoint)}

        key = {**self._data_key(), "checkpoint": checkpoint.digest, **versions("torch")}
        stored, why = self.store.get(f"{entry.folder}.measured", "measure", key, make)
        entry.made(why)
        self.reference = Predictions.load(stored.path / _PREDICTIONS)
        self.reference_digest = stored.digest
        entry.cost.update(stored.info["cost"])
        found = measure(self.workspace.task, self.workspace.examples, self.reference, self.reference)
        entry.add_metrics(found)
        return found

    def measure(
        self,
        entry: StageEntry,
        digest: str,
        runner: Callable[[], Runner],
        backend: str,
        *,
        cost: Cost = dict,
        single: bool = False,
    ) -> Sequence[Measurement]:
        """Per-sample results of an artifact, from disk where neither it, the data nor the reference have changed.

        Args:
            entry: the stage; gets metrics and costs.
            digest: of the artifact.
            runner: opens it.
            backend: whose versions the result depends on, see ``versions``.
            cost: measures costs in the same go.
            single: it is the graph of single tokens, whose metrics stand beside those of the other one.
        """

        def make(folder: Path) -> dict[str, Any]:
            with runner() as active:
                candidate = self._predict(active)
            found = measure(self.workspace.task, self.workspace.examples, self.reference, candidate)
            save_measurements(found, folder / SAMPLES)
            return {"cost": cost()}

        key = {**self._data_key(), "artifact": digest, "reference": self.reference_digest, **versions(backend)}
        stored, why = self.store.get(f"{entry.folder}.measured{'-single' * single}", "measure", key, make)
        entry.made(why)
        found = load_measurements(stored.path / SAMPLES)
        entry.add_metrics([replace(one, output=f"{one.output}, {SINGLE}") for one in found] if single else found)
        entry.cost.update(stored.info["cost"])
        return found

    def judge_single(self, entry: StageEntry, digest: str, path: Path) -> list[Verdict]:
        """Verdicts on the graph of single tokens, from the same whole sequences that the other graph is judged on."""
        found = self.measure(entry, digest, lambda: OrtRunner(judged(path)), "onnxruntime", single=True)
        gate = self.workspace.recipe.gate.for_stage(entry.name, entry.kind)
        verdicts = judge_all(found, gate, entry.name, judge_structure if self.workspace.tiny else judge)
        return [replace(verdict, output=f"{verdict.output}, {SINGLE}") for verdict in verdicts]

    def kernels(self, entry: StageEntry, graph: Graph) -> list[Verdict]:
        """Verdicts on the kernels of the engine, and of that of single tokens."""
        engine, found = entry.engine or {}, []
        for made, promises in ((engine, graph.promises), (engine.get("decode_engine"), graph.single_promises)):
            listing = None if made is None or made["listing"] is None else ListingSummary(**made["listing"])
            verdicts = judge_kernels(listing, promises, entry.name)
            found += verdicts if made is engine else [replace(v, output=f"{v.output}, {SINGLE}") for v in verdicts]
        return found

    def judge(
        self,
        entry: StageEntry,
        measurements: Sequence[Measurement],
        others: Sequence[Verdict] = (),
        *,
        can_roll_back: bool,
    ) -> bool:
        """Whether the stage's result is used; raises ``Stopped`` when a gate, this one or ``others``, ends the run."""
        self.monitor.work("gate", 0)
        gate = self.workspace.recipe.gate.for_stage(entry.name, entry.kind)
        one = judge_structure if self.workspace.tiny else judge
        verdicts = [*judge_all(measurements, gate, entry.name, one), *others, *self._judge_speed(entry)]
        return self.results.decide(entry, verdicts, gate, can_roll_back=can_roll_back)

    def could_not_run(self, entry: StageEntry, reason: str, others: Sequence[Verdict] = ()) -> None:
        """A verdict that says so for every judged output: a check that did not run is never a pass.

        Verdicts of ``others`` that did not need to run it count all the same.
        """
        gate = self.workspace.recipe.gate.for_stage(entry.name, entry.kind)
        known = measure(self.workspace.task, self.workspace.examples, self.reference, self.reference)
        verdicts = [not_run(found, gate, entry.name, reason) for found in known if gate.judges(found)]
        self.results.decide(entry, [*verdicts, *others, *self._judge_speed(entry)], gate, can_roll_back=False)

    def _judge_speed(self, entry: StageEntry) -> list[Verdict]:
        recipe = self.workspace.recipe
        stage = {"name": entry.name, "kind": entry.kind, "cost": entry.cost}
        verdicts = judge_stage(stage, recipe.gate, deployed(recipe.stage_names()))
        return [speed_not_run(v.limit, v.stage, NOT_JUDGED) for v in verdicts] if self.workspace.tiny else verdicts

    def latency(self, dense: Path, path: Path, costs: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
        """Latency beside the untouched model's fp32 graph, in one interleaved run on one thread, with all times.

        Args:
            dense: the untouched model's graph.
            path: what is timed.
            costs: of both graphs; where the second one is smaller but not faster, the likely reason is looked for.
        """
        self.monitor.work("latency", 0)
        row = self.cost_row()
        with ExitStack() as stack:
            runners = {
                label: stack.enter_context(OrtRunner(graph, threads=1))
                for label, graph in (("reference", dense), ("value", path))
            }
            found = latency(runners, row)
        value, reference = found["value"], found["reference"]
        times = {label: [round(ms, 5) for ms in one.times_ms] for label, one in found.items()}
        before, after = costs
        why = ""
        if is_smaller(before, after) and not Speedup.of(times["reference"], times["value"]).faster:
            profiles = [operator_times(graph, first_call(row, graph_inputs(graph))) for graph in (dense, path)]
            why = why_not_faster(Sizes.of(dense, before), Sizes.of(path, after), *profiles)
        return {
            "median_ms": value.median_ms,
            "p90_ms": value.p90_ms,
            "reference_ms": reference.median_ms,
            "device": value.device,
            "method": value.method,
            "rounds": value.rounds,
            "threads": value.threads,
            "tokens": self._tokens(row),
            "times_ms": times,
            "why": why,
        }

    def _tokens(self, row: Mapping[str, Any]) -> int | None:
        """Tokens of that row; None where its inputs have none."""
        axes = self.workspace.examples.dynamic_axes()
        sizes = [row[name].shape[axis] for name, varying in axes.items() for axis in varying if axis > 0]
        return int(sizes[0]) if sizes else None

    def compare(self, graphs: Mapping[Form, Path]) -> dict[Form, float]:
        """Median latencies in ms of several graphs, in one interleaved run on one thread."""
        self.monitor.work("latency", 0)
        with ExitStack() as stack:
            runners = {str(name): stack.enter_context(OrtRunner(path, threads=1)) for name, path in graphs.items()}
            found = latency(runners, self.cost_row())
        return {name: found[name].median_ms for name in graphs}

    def model_cost(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Parameters, multiply-accumulates and kv bytes of a PyTorch model, for one sample."""
        return model_cost(checkpoint.copy().view(), to_torch(self.cost_row())).to_json()

    def cost_row(self) -> dict[str, Any]:
        """One sample, as long as engines are optimised for."""
        return cost_row(self.workspace.checkpoint.module, self.workspace.examples, self.workspace.sequence)

    def _predict(self, runner: Runner) -> Predictions:
        examples, recipe = self.workspace.examples, self.workspace.recipe
        advance = self.monitor.work(f"{len(examples)} samples on {runner.name}", len(examples))
        return predict(runner, self.workspace.task, examples, batch_size=recipe.batch_size, progress=advance)

    def _data_key(self) -> Mapping[str, Any]:
        recipe = self.workspace.recipe
        return {
            "data": self.workspace.data_digest,
            "task": recipe.task.model_dump(mode="json", exclude={"data"}),
            "batch_size": recipe.batch_size,
            # Candidate and reference are measured on the same machine, also when the folder is moved to another one.
            "device": device_name(),
            "sequence": self.workspace.sequence,
        }
