"""The quantize stage: calibrate on the exported graph, decide, and write the quantized graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from headwise.calibration.products import ReadInput, dynamic_input, quantized_input
from headwise.calibration.ranges import Observed, collect_ranges, load_ranges, save_ranges
from headwise.device.runtimes import FULL
from headwise.export.decode import decode_for_onnxruntime
from headwise.export.decoder import DECODE
from headwise.export.dynamic import write_dynamic
from headwise.export.matrices import TapRunner, find_matrices, find_tables, find_taps
from headwise.export.ports import cache_bytes
from headwise.export.precision import Precision
from headwise.export.quantize import SCALE_DTYPES, write_quantized
from headwise.export.single import absorbed_names, require_like, smooth_single
from headwise.export.smoothing import require_same, smooth
from headwise.export.targets import CPU
from headwise.model.quantization import Codes, Matrix, QuantPlan
from headwise.passes.quantize import Quantize
from headwise.pipeline.graphs import DECODED, GRAPH, Graph
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.quantize.kv import write_kv
from headwise.pipeline.quantize.planned import Planned
from headwise.pipeline.quantize.sweep import Sweep, set_aside
from headwise.pipeline.store import Store, versions
from headwise.pipeline.workspace import Workspace

_RANGES = "ranges.npz"
_READS: Mapping[str, ReadInput] = {FULL: quantized_input, CPU: dynamic_input}


class Quantizer:
    """Makes quantized graphs from one fp32 graph.

    Args:
        workspace: has the recipe and the calibration samples.
        store: keeps the ranges, which change only with the graph and the samples.
        monitor: receives progress.
        source: the fp32 graph.
    """

    def __init__(self, workspace: Workspace, store: Store, monitor: Monitor, source: Graph) -> None:
        self.workspace = workspace
        self.store = store
        self.monitor = monitor
        self.source = source
        options = workspace.recipe.quantize
        budget = None if options is None else options.budget
        self.held = 0 if budget is None else budget.samples
        self.fitted, self.judging = set_aside(workspace.calibration, self.held)

    def key(self, options: Quantize) -> dict[str, Any]:
        """What a quantized graph depends on, whatever the runtime."""
        return {**self._key(options), "budget": options.model_dump(mode="json")["budget"]}

    def _key(self, options: Quantize) -> dict[str, Any]:
        """The same for what does not depend on the budget."""
        plain = options.model_dump(mode="json", exclude={"budget"})
        return {**self._ranges_key(), "options": plain, **versions("onnx")}

    def _ranges_key(self) -> dict[str, Any]:
        recipe = self.workspace.recipe
        return {
            "parent": self.source.digest,
            "calibration": self.workspace.calibration_digest,
            "batch_size": recipe.batch_size,
            "set_aside": self.held,
            **versions("onnxruntime"),
        }

    def for_tensorrt(self, options: Quantize, precision: Precision, folder: Path) -> dict[str, Any]:
        """Fill the folder of a stage with a graph of Q/DQ nodes; what the manifest remembers.

        Args:
            options: of the pass.
            precision: of what is not quantized.
            folder: to be filled.
        """
        dtype = SCALE_DTYPES[precision]
        made = self._decide(options, FULL, dtype)
        keep_io, promises = self.workspace.recipe.export.keep_io, {}
        codes = self._codes(options, made, quantized_input, dtype)
        for name, (source, own) in codes.items():
            path = folder / name
            written = write_quantized(source, path, made.plan, own, precision=precision, keep_io=keep_io)
            decode_for_onnxruntime(path, folder / DECODED[name])
            promises[name] = [asdict(promise) for promise in written.promises]
        return {
            **made.record(codes[GRAPH][1], quantized_input, dtype, folder),
            "cost": _cache_cost(made, folder / GRAPH),
            "promises": promises[GRAPH],
            "single_promises": promises.get(DECODE, []),
            "runs_on_cpu": precision != "bf16",
        }

    def for_cpu(self, options: Quantize, folder: Path) -> dict[str, Any]:
        """The same for ONNX Runtime on a CPU: integer products, with input ranges of every call."""
        dtype = SCALE_DTYPES["fp32"]
        made = self._decide(options, CPU, dtype)
        codes = self._codes(options, made, dynamic_input, dtype)
        for name, (source, own) in codes.items():
            write_dynamic(source, folder / name, made.plan, own)
        cost = _cache_cost(made, folder / GRAPH)
        return {**made.record(codes[GRAPH][1], dynamic_input, dtype, folder), "cost": cost}

    @staticmethod
    def _codes(
        options: Quantize, made: Planned, read: ReadInput, dtype: np.dtype[Any]
    ) -> dict[str, tuple[Path, dict[str, Codes]]]:
        """Name of every graph -> the fp32 graph, and the numbers that the plan asks for."""
        codes = options.codes(made.plan, made.matrices, made.seen, read, dtype)
        codes |= options.table_codes(made.plan.tables, made.tables, dtype)
        found = {GRAPH: (made.path, codes)}
        if made.single is not None:
            require_like(onnx.load(str(made.single)), onnx.load(str(made.path)))
            # What is absorbed has the same codes; its bias makes good what these do, as its input is not quantized.
            absorbed = QuantPlan(matrices=made.absorbed())
            others = options.codes(absorbed, made.matrices, made.seen, read, dtype)
            found[DECODE] = made.single, {**codes, **others}
        return found

    def _decide(self, options: Quantize, runtime: str, dtype: np.dtype[Any]) -> Planned:
        """The plan for one runtime, and what it rests on."""
        if options.kv is None:
            made = self._within_budget(options, self._smoothed(options, runtime), runtime, dtype)
            tables = find_tables(made.path) if options.embeddings else ()
            return replace(made, tables=tables, plan=replace(made.plan, tables=options.plan_tables(tables)))

        def make(folder: Path) -> dict[str, Any]:
            given = self.workspace, self.monitor, self.source, options, folder
            return {"kv": write_kv(*given, examples=self.fitted, partial=self.store.partial(name, key))}

        name, key = f"{self.source.path.parent.name}.kv", {**self._ranges_key(), "kv": options.kv, **versions("onnx")}
        stored, _ = self.store.get(name, "kv", key, make)
        source = replace(self.source, path=stored.path / GRAPH, digest=stored.digest)
        inner = Quantizer(self.workspace, self.store, self.monitor, source)
        return replace(inner._decide(options.model_copy(update={"kv": None}), runtime, dtype), kv=stored.info["kv"])

    def _smoothed(self, options: Quantize, runtime: str) -> Planned:
        """The plan, on a graph whose channels are scaled as it says; the scales suit the products of the runtime."""
        path, matrices = self.source.path, find_matrices(self.source.path)
        name = f"{path.parent.name}.smoothed-{runtime}"
        partial = self.store.partial(name, self._key(options))
        seen = self._ranges(matrices, runtime, moments=options.moments() and options.smooth is None)

        def make(folder: Path) -> dict[str, Any]:
            self.monitor.work("smooth", 0)
            scales = options.smoothing(matrices, seen, _READS[runtime])
            model = onnx.load(str(path))
            names = list(options.plan(matrices, seen).quantized())
            single = None if self.source.decode is None else onnx.load(str(self.source.decode))
            made = smooth(model, scales, names, fixed=() if single is None else absorbed_names(single.graph))
            onnx.save(model, str(folder / GRAPH))
            error = require_same(path, folder / GRAPH, self.workspace.examples.example_batch())
            if single is not None and self.source.decode is not None:
                smooth_single(single, matrices, scales, names)
                onnx.save(single, str(folder / DECODE))
                batch = self.workspace.examples.example_batch()
                error = max(error, require_same(self.source.decode, folder / DECODE, batch))
            smoothed = find_matrices(folder / GRAPH)
            final = self._collect(folder / GRAPH, smoothed, runtime, moments=options.moments(), partial=partial)
            save_ranges(final, folder / _RANGES)
            return {"smooth": scales, "scales": {**asdict(made), "twin_error": error}}

        if options.smooth is None:
            plan = options.plan(matrices, seen)
            return Planned(path=path, matrices=matrices, seen=seen, plan=plan)
        stored, _ = self.store.get(name, "smoothed", self._key(options), make)
        scales = {tap: tuple(exponents) for tap, exponents in stored.info["smooth"].items()}
        matrices, seen = find_matrices(stored.path / GRAPH), load_ranges(stored.path / _RANGES)
        plan = options.plan(matrices, seen, scales)
        return Planned(path=stored.path / GRAPH, matrices=matrices, seen=seen, plan=plan, scales=stored.info["scales"])

    def _within_budget(self, options: Quantize, made: Planned, runtime: str, dtype: np.dtype[Any]) -> Planned:
        """The plan with as many matrices left alone as the budget asks for."""
        if options.budget is None:
            return made
        fp32 = SCALE_DTYPES["fp32"]
        codes = options.codes(made.plan, made.matrices, made.seen, _READS[runtime], fp32)

        def write(folder: Path, plan: QuantPlan) -> Path:
            chosen = {name: codes[name] for name in plan.quantized()}
            graph, decoded = folder / GRAPH, folder / DECODED[GRAPH]
            if runtime == CPU:
                write_dynamic(made.path, graph, plan, chosen)
                return graph
            write_quantized(made.path, graph, plan, chosen, precision="fp32")
            return decoded if decode_for_onnxruntime(graph, decoded) else graph

        sweep = Sweep(self.workspace, made.path, made.plan, write, self.judging)

        def make(folder: Path) -> dict[str, Any]:
            del folder
            names = list(made.plan.quantized())
            advance = self.monitor.work("one matrix at a time", len(names))
            drops = {}
            for name in names:
                drops[name] = sweep.drop([name])
                advance(1)
            return {"drops": drops, "metric": sweep.metric, "samples": len(sweep.examples)}

        key = {**self._key(options), "samples": options.budget.samples}
        stored, _ = self.store.get(f"{self.source.path.parent.name}.sweep-{runtime}", "sweep", key, make)
        self.monitor.work("budget", 0)
        return made.within(options.budget, stored.info, sweep.drop, dtype)

    def _ranges(self, matrices: Sequence[Matrix], runtime: str, *, moments: bool) -> dict[str, Observed]:
        """What calibration saw, from disk where neither the graph nor the samples have changed."""
        name, key = f"{self.source.path.parent.name}.ranges-{runtime}", {**self._ranges_key(), "moments": moments}
        partial = self.store.partial(name, key)

        def make(folder: Path) -> dict[str, Any]:
            seen = self._collect(self.source.path, matrices, runtime, moments=moments, partial=partial)
            save_ranges(seen, folder / _RANGES)
            return {}

        stored, _ = self.store.get(name, "ranges", key, make)
        return load_ranges(stored.path / _RANGES)

    def _collect(
        self, path: Path, matrices: Sequence[Matrix], runtime: str, *, moments: bool, partial: Path
    ) -> dict[str, Observed]:
        examples = self.fitted
        names = [matrix.tap for matrix in matrices]
        return collect_ranges(
            TapRunner(path, names),
            examples,
            find_taps(path, names),
            moments=names if moments else (),
            padding=runtime == CPU,
            batch_size=self.workspace.recipe.batch_size,
            progress=self.monitor.work("ranges", len(examples)),
            partial=partial,
        )


def _cache_cost(made: Planned, graph: Path) -> dict[str, int]:
    """What a cache of codes holds of a token, read from the graph; nothing where there is no such cache."""
    return {"kv_bytes_per_token": cache_bytes(graph)} if made.kv.get("cache") else {}
