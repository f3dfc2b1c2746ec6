"""What the stages of a run produced, the decision after each gate, and how the run ended."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.artifacts import Artifact, digest_file, write_atomic
from headwise.errors import HeadwiseError, MachineError, MissingDependencyError, StorageError
from headwise.gates.cost import device_name
from headwise.gates.judge import GateSpec, Outcome, Verdict
from headwise.gates.measure import Measurement
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.report.document import SCHEMA, write_json
from headwise.pipeline.store import installed_version
from headwise.pipeline.tiny import NOT_JUDGED
from headwise.pipeline.workspace import Workspace

PACKAGES = ("headwise", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy", "tensorrt-rtx")


_PASSED = "every gate that could run passed"


class Stopped(Exception):
    """A gate said no, and its policy is to stop."""


@dataclass(slots=True, kw_only=True)
class StageEntry:
    """One stage of the report; the fields are those of ``report.json``.

    Attributes:
        folder: name of the stage's folder; its measurements lie in ``<folder>.measured``.
        cached: nothing had to be made; ``why`` says what was made again for which reason.
    """

    name: str
    kind: str
    folder: str
    status: str = "skipped"
    cached: bool = False
    why: str = ""
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {**plain, "verdicts": [verdict.to_json() for verdict in self.verdicts]}

    def made(self, why: str) -> None:
        """Note that a part of the stage was found on disk (no reason) or was made, and why."""
        self.cached = not why and not self.why
        self.why = self.why or why

    def add_metrics(self, measurements: Sequence[Measurement]) -> None:
        """Reference and value of every measurement, in the metric's unit."""
        for found in measurements:
            reference, value = found.values()
            self.metrics.append(
                {
                    "output": found.output,
                    "metric": found.metric,
                    "unit": found.unit,
                    "reference": reference,
                    "value": value,
                    "higher_is_better": found.higher_is_better,
                    "judged": found.judged,
                }
            )

    def line(self) -> str:
        """One line for the terminal."""
        judged = [f"{m['output']} {m['metric']} {m['value']:.2f}" for m in self.metrics if m["judged"]]
        parts = [self.status, *judged, f"{self.seconds:.1f} s" + (" (cached)" if self.cached else "")]
        return "  ".join(parts) + (f"\n  {self.reason}" if self.reason and self.status != "passed" else "")


class Results:
    """Collects the stages and keeps ``report.json`` on disk up to date."""

    def __init__(self, workspace: Workspace, folder: Path, monitor: Monitor, *, require_engine_run: bool) -> None:
        self.workspace = workspace
        self.folder = folder
        self.monitor = monitor
        self.require_engine_run = require_engine_run
        self.stages: list[StageEntry] = []
        self.ending: BaseException | None = None
        self.ended = False
        self.started = time.perf_counter()

    def expect(self, names: Sequence[tuple[str, str]]) -> None:
        """Name the (name, kind) of all stages beforehand, so that a report also lists those that never ran."""
        # Engines share a number: one more target must not move, and so make again, the others.
        last = sum(kind != "engine" for _, kind in names)
        self.stages = [
            StageEntry(name=name, kind=kind, folder=f"{min(position, last):02d}-{name}")
            for position, (name, kind) in enumerate(names)
        ]

    @contextmanager
    def stage(self, name: str) -> Iterator[StageEntry]:
        """Run one stage: time it, catch what it raises, and write the report after it."""
        entry = next(stage for stage in self.stages if stage.name == name)
        self.monitor.start(name)
        start = time.perf_counter()
        try:
            yield entry
        except KeyboardInterrupt:
            entry.status, entry.reason = "interrupted", "interrupted; the same command continues here"
            raise
        except Stopped:
            raise
        except HeadwiseError as error:
            entry.status, entry.reason = "error", str(error)
            raise
        except Exception as error:
            entry.status, entry.reason = "error", f"{type(error).__name__}: {error}"
            raise self._unexpected(name, error) from error
        finally:
            entry.seconds = time.perf_counter() - start
            self.monitor.finish(name, entry.line())
            write_json(self.report(time.perf_counter() - self.started), self.folder)

    def _unexpected(self, name: str, error: Exception) -> HeadwiseError:
        log = self.folder / "error.log"
        where = f"see {log}"
        try:
            write_atomic(log, "".join(traceback.format_exception(error)))
        except StorageError as full:
            where = f"error.log could not be written either ({full.found})"
        return HeadwiseError(
            f"stage {name} failed: {type(error).__name__}: {error}",
            expected="a stage that ends",
            fix=f"{where}; finished stages are kept, the same command continues with this one",
        )

    def decide(self, entry: StageEntry, verdicts: Sequence[Verdict], gate: GateSpec, *, can_roll_back: bool) -> bool:
        """Set the stage's status from its verdicts.

        Returns:
            Whether the stage's result is used; False after a rollback.

        Raises:
            Stopped: a verdict is not PASS and the policy is to stop, or there is nothing to roll back to.
        """
        entry.verdicts.extend(verdicts)
        bad = [verdict for verdict in verdicts if verdict.outcome not in (Outcome.PASS, Outcome.NOT_RUN)]
        not_run = [verdict for verdict in verdicts if verdict.outcome is Outcome.NOT_RUN]
        if not bad:
            # That the right kernels were chosen does not replace running them.
            accuracy = [verdict.outcome for verdict in verdicts if verdict.gate == "accuracy"]
            # What was measured and means nothing, see ``tiny``, has samples: the stage did run.
            ran = any(verdict.samples for verdict in verdicts if verdict.gate == "accuracy")
            entry.status = "not-run" if set(accuracy) == {Outcome.NOT_RUN} and not ran else "passed"
            entry.reason = not_run[0].reason if not_run else ""
            return True
        entry.reason = "; ".join(f"{v.output} {v.metric}: {v.outcome}, {v.reason}" for v in bad)
        if gate.on_fail == "warn":
            entry.status = "warned"
            return True
        if gate.on_fail == "rollback" and can_roll_back:
            entry.status = "rolled-back"
            return False
        entry.status = "failed"
        raise Stopped(f"the gate after {entry.name} said no: {entry.reason}")

    def keep(self, entry: StageEntry, artifact: Artifact) -> None:
        """List the artifact's files in the stage."""
        for path in sorted(p for p in artifact.path.rglob("*") if p.is_file()):
            relative = path.relative_to(self.folder).as_posix()
            entry.artifacts.append({"path": relative, "bytes": path.stat().st_size, "sha256": digest_file(path)})

    def end(self, ending: BaseException | None = None) -> None:
        """The run is over; ``ending`` is what ended it early."""
        self.ended, self.ending = True, ending

    def outcome(self) -> tuple[str, int, str]:
        """(outcome, exit code, reason)."""
        if not self.ended:
            # What a killed run leaves behind must not look like one that passed.
            return "interrupted", 130, "not finished; the same command continues at the first unfinished stage"
        if isinstance(self.ending, KeyboardInterrupt):
            return "interrupted", 130, "interrupted; the same command continues at the first unfinished stage"
        if isinstance(self.ending, Stopped):
            return "fail", 1, str(self.ending)
        if isinstance(self.ending, MachineError | MissingDependencyError):
            return "not-run", self.ending.exit_code, str(self.ending)
        if isinstance(self.ending, HeadwiseError):
            return "error", self.ending.exit_code, str(self.ending)
        engines_not_run = [s for s in self.stages if s.kind == "engine" and s.status == "not-run"]
        if engines_not_run and self.require_engine_run:
            return "not-run", 4, f"{engines_not_run[0].name} was not run: {engines_not_run[0].reason}"
        warned = [s.name for s in self.stages if s.status == "warned"]
        if warned:
            return "warn", 0, "the gate only warned after " + ", ".join(warned)
        rolled_back = [s.name for s in self.stages if s.status == "rolled-back"]
        undone = f" without {', '.join(rolled_back)}, rolled back" if rolled_back else ""
        unrun = f"; not run here: {', '.join(s.name for s in self.stages if s.status == 'not-run')}"
        ran_all = not any(s.status == "not-run" for s in self.stages)
        done = f"tiny: every stage works, accuracy was {NOT_JUDGED}" if self.workspace.tiny else _PASSED + undone
        return "pass", 0, done + ("" if ran_all else unrun)

    def report(self, seconds: float) -> dict[str, Any]:
        """The content of ``report.json``."""
        outcome, exit_code, reason = self.outcome()
        versions = {name: version for name in PACKAGES if (version := installed_version(name))}
        source = self.workspace.checkpoint
        return {
            "schema": SCHEMA,
            "headwise": versions["headwise"],
            "outcome": outcome,
            "exit_code": exit_code,
            "reason": reason,
            "tiny": self.workspace.tiny,
            "checkpoint": {
                "source": source.source,
                "folder": str(source.folder.resolve()) if source.folder else None,
                "digest": source.digest,
                "kind": source.kind,
                "model_type": source.model_type,
            },
            "recipe": self.workspace.recipe.to_json(),
            "seconds": seconds,
            "environment": {"python": platform.python_version(), "packages": versions, "device": device_name()},
            "data": self.workspace.data_json(),
            "stages": [stage.to_json() for stage in self.stages],
        }
