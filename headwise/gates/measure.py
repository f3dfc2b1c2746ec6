"""Run a task's samples through a runner, and turn two sets of predictions into measurements that can be judged."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headwise.artifacts import write_atomic
from headwise.calibration.tasks import ARGMAX, NLL, Examples, Task
from headwise.errors import StorageError
from headwise.gates.metrics import METRICS, find_metric

Array = NDArray[Any]
Progress = Callable[[int], None]

SAMPLES = "samples.npz"
"""Name of the file of per-sample results in an artifact of the kind ``measure``."""
_ARRAYS = ("labels", "reference", "candidate")


class RunBatch(Protocol):
    """What a gate needs of a runner: a batch of named arrays in, named arrays out."""

    def __call__(self, batch: Mapping[str, Array], /) -> dict[str, Array]:
        """Run one batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What a task read from a model's outputs.

    Attributes:
        values: name -> (samples, ...), or (samples, rows per sample, ...) for tasks with several rows per sample.
    """

    values: Mapping[str, Array]

    def save(self, path: Path) -> None:
        """Write them as an npz file.

        Raises:
            StorageError: the file cannot be written.
        """
        _save_arrays(path, {f"values.{name}": values for name, values in self.values.items()})

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what ``save`` wrote.

        Raises:
            StorageError: the file is missing or damaged.
        """
        return cls(values={name.removeprefix("values."): array for name, array in _load_arrays(path).items()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """One metric of one output on paired samples of the untouched model and of a candidate.

    Attributes:
        output: name of the output.
        metric: name of the metric, or ``module:function``.
        unit: ``points``, ``nats``, or empty for the metric's own unit.
        higher_is_better: direction.
        judged: whether every gate judges it; others only where the gate names their metric.
        labels: (samples, ...) or None.
        reference: (samples, ...) what the metric reads of the untouched model.
        candidate: the same of the candidate; empty where it lacks the output.
    """

    output: str
    metric: str
    unit: str
    higher_is_better: bool
    judged: bool
    labels: Array | None
    reference: Array
    candidate: Array

    def values(self) -> tuple[float, float]:
        """(reference, candidate) in the metric's unit; NaN where it is not defined."""
        metric = find_metric(self.metric, higher_is_better=self.higher_is_better)
        reference, candidate = (
            metric.of(values, self.labels) if len(values) and np.isfinite(values).all() else float("nan")
            for values in (self.reference, self.candidate)
        )
        return reference, candidate


def predict(
    runner: RunBatch, task: Task, examples: Examples, *, batch_size: int = 32, progress: Progress | None = None
) -> Predictions:
    """Run every distinct row once, longest first, and put what the task reads back in the order of the samples.

    Args:
        runner: the model.
        task: reads its outputs.
        examples: the samples.
        batch_size: samples per batch.
        progress: called with the number of samples of every finished batch.

    Raises:
        DataError: the outputs do not fit the task.
    """
    rows, twin = examples.unique_rows()
    parts: dict[str, list[tuple[Array, Array]]] = {}
    done = 0
    for batch in rows.batches(batch_size * examples.per_sample):
        for name, found in task.read(runner(batch.inputs), batch).items():
            parts.setdefault(name, []).append((batch.samples, found))
        before, done = done, done + len(batch.samples)
        if progress is not None:
            progress(done * len(examples) // len(rows) - before * len(examples) // len(rows))
    values = {name: _scatter(pieces, len(rows))[twin] for name, pieces in parts.items()}
    if examples.per_sample > 1:
        values = {n: v.reshape(-1, examples.per_sample, *v.shape[1:]) for n, v in values.items()}
    return Predictions(values=values)


def measure(task: Task, examples: Examples, reference: Predictions, candidate: Predictions) -> tuple[Measurement, ...]:
    """The task's own metrics, and how closely the candidate's outputs follow the reference whatever the labels say.

    ``fidelity`` is the mean cosine of embeddings, pooled states or class logits; ``agreement`` is the share of samples
    or tokens with the same winning class. Both are 100 points for the reference itself, and are judged where the task
    is fidelity or the gate names them. An output with a single number has neither.

    Args:
        task: says which metric judges which output.
        examples: the samples that both were predicted on.
        reference: predictions of the untouched model.
        candidate: predictions of the model in question.

    Raises:
        DataError: the reference lacks a judged output.
    """
    found: list[Measurement] = []
    for judged in task.metrics():
        metric = find_metric(judged.metric, higher_is_better=judged.higher_is_better)
        custom = judged.metric not in METRICS
        sides = [task.metric_input(judged.output, p.values, custom=custom) for p in (reference, candidate)]
        found.append(
            Measurement(
                output=judged.output,
                metric=metric.name,
                unit=metric.unit,
                higher_is_better=metric.higher_is_better,
                judged=True,
                labels=examples.labels.get(judged.output),
                reference=sides[0],
                candidate=sides[1],
            )
        )
    own = not found
    for name, values in reference.values.items():
        closeness = _agreement if name.endswith(ARGMAX) else _cosine
        if name.endswith(NLL) or values.ndim < 2 or (closeness is _cosine and values.shape[-1] < 2):
            continue
        other = candidate.values.get(name)
        metric = METRICS["agreement" if closeness is _agreement else "fidelity"]
        found.append(
            Measurement(
                output=name.removesuffix(ARGMAX),
                metric=metric.name,
                unit=metric.unit,
                higher_is_better=True,
                judged=own,
                labels=None,
                reference=closeness(values, values),
                candidate=np.empty(0) if other is None or other.shape != values.shape else closeness(values, other),
            )
        )
    return tuple(found)


def save_measurements(measurements: Sequence[Measurement], path: Path) -> None:
    """Write per-sample results as npz, so that they can be judged again without the model.

    Raises:
        StorageError: the file cannot be written.
    """
    about = [
        {"output": m.output, "metric": m.metric, "higher_is_better": m.higher_is_better, "judged": m.judged}
        for m in measurements
    ]
    arrays: dict[str, Array] = {"measurements": np.array(json.dumps(about))}
    for index, found in enumerate(measurements):
        sides = {name: getattr(found, name) for name in _ARRAYS}
        arrays |= {f"{index}.{name}": values for name, values in sides.items() if values is not None}
    _save_arrays(path, arrays)


def load_measurements(path: Path) -> tuple[Measurement, ...]:
    """Read what ``save_measurements`` wrote.

    Raises:
        StorageError: the file is missing or damaged.
    """
    arrays = _load_arrays(path)
    try:
        return tuple(
            Measurement(
                **about,
                unit=find_metric(about["metric"], higher_is_better=about["higher_is_better"]).unit,
                labels=arrays.get(f"{index}.labels"),
                reference=arrays[f"{index}.reference"],
                candidate=arrays[f"{index}.candidate"],
            )
            for index, about in enumerate(json.loads(str(arrays["measurements"])))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _scatter(parts: Sequence[tuple[Array, Array]], rows: int) -> Array:
    """Values of batches in row order; token axes of different lengths are filled with -1."""
    shape = np.max([values.shape[1:] for _, values in parts], axis=0) if parts[0][1].ndim > 1 else ()
    gathered: Array = np.full((rows, *(int(size) for size in shape)), -1, dtype=parts[0][1].dtype)
    for indices, values in parts:
        missing = [(0, int(full) - size) for full, size in zip(shape, values.shape[1:], strict=True)]
        gathered[indices] = np.pad(values, [(0, 0), *missing], constant_values=-1)
    return gathered


def _cosine(reference: Array, candidate: Array) -> Array:
    """(samples,) mean over a sample's rows. Two zero vectors agree, a zero vector agrees with nothing else."""
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    both_zero = ~left.any(axis=-1) & ~right.any(axis=-1)
    cosine = np.where(both_zero, 1.0, (left * right).sum(axis=-1) / np.where(lengths == 0, 1.0, lengths))
    return np.asarray(cosine.reshape(len(cosine), -1).mean(axis=1))


def _agreement(reference: Array, candidate: Array) -> Array:
    """(samples,) share of a sample's classes that are the same; -1 marks padding."""
    left, right = reference.reshape(len(reference), -1), candidate.reshape(len(candidate), -1)
    real = left >= 0
    return np.asarray(((left == right) & real).sum(axis=1) / np.where(real.any(axis=1), real.sum(axis=1), np.nan))


def _save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **{name: np.asarray(values) for name, values in arrays.items()})
    write_atomic(path, buffer.getvalue())


def _load_arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} cannot be read: {error}",
        expected="results that headwise wrote",
        fix="delete the file and run the same command again",
    )
