"""What all stages share: the untouched checkpoint, the task, the gate's samples and the calibration samples."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from headwise.artifacts import digest_json
from headwise.calibration.data import load_table, sample
from headwise.calibration.stats import Stat
from headwise.calibration.tasks import Examples, Task, make_task
from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint
from headwise.pipeline.recipe import Recipe


class Workspace:
    """Loads the data once and checks that they can be used together.

    Attributes:
        checkpoint: the untouched model; stages work on copies.
        recipe: the validated recipe.
        task: how to feed the model and read its outputs.
        examples: the samples that every gate judges on.
        data_digest: digest of these samples with their labels.
        calibration_digest: digest of the calibration samples; empty without any.

    Raises:
        DataError: data are missing, do not fit the model, or calibration and gate use the same samples.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.task: Task = make_task(recipe.task)
        table = load_table(recipe.task.data, self.task.roles())
        self.examples: Examples = self.task.encode(table, checkpoint)
        self.data_digest = digest_json([table.digest, self.examples.digest])
        self.calibration_digest = ""
        if recipe.calibration is not None:
            self._refuse_shared_samples()

    @cached_property
    def calibration(self) -> Examples:
        """The calibration samples; with labels only where a pass needs them."""
        spec = self.recipe.calibration
        assert spec is not None, "a recipe with passes has calibration data"
        labels = any(Stat.LOSS_GRADIENT in pass_.needs() for pass_ in self.recipe.passes)
        table = sample(load_table(spec.data, self.task.roles(labels=labels)), spec.samples, spec.seed)
        self.calibration_digest = table.digest
        return self.task.encode(table, self.checkpoint, labels=labels)

    def _refuse_shared_samples(self) -> None:
        shared = self.calibration.shared_with(self.examples)
        if shared == len(self.calibration):
            raise DataError(
                f"all {shared} calibration samples are among the gate's samples",
                expected="calibration and gate data without common samples: a model fitted to its judge always passes",
                fix="calibrate on the training split and judge on the test split",
            )

    def data_json(self) -> dict[str, Any]:
        """Where the samples came from, for the report."""
        sets = {"task": self.examples}
        if self.recipe.calibration is not None:
            sets["calibration"] = self.calibration
        found: dict[str, Any] = {
            name: {"source": examples.source, "digest": examples.digest, "samples": len(examples)}
            for name, examples in sets.items()
        }
        if "calibration" in found:
            found["calibration"]["shared_with_task"] = self.calibration.shared_with(self.examples)
        return found
