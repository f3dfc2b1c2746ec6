"""What all stages share: the untouched checkpoint, the task, the gate's samples and the calibration samples."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from headwise.artifacts import digest_json
from headwise.calibration.data import load_table, sample
from headwise.calibration.stats import LABELLED
from headwise.calibration.tasks import Examples, Task, make_task
from headwise.errors import DataError, RecipeError, did_you_mean
from headwise.model.checkpoint import Checkpoint
from headwise.pipeline.recipe import Recipe

_COINCIDENCE = 0.05
"""Share of the gate's samples that may also be calibration samples: short texts do occur twice in honest splits."""


class Workspace:
    """Loads the data once and checks that they can be used together.

    Attributes:
        checkpoint: the untouched model; stages work on copies.
        recipe: the validated recipe.
        task: how to feed the model and read its outputs.
        examples: the samples that every gate judges on.
        data_digest: digest of these samples with their labels.
        tiny: whether the model is a small one with random weights, whose accuracy means nothing.
        calibration_digest: digest of the calibration samples; empty without any.

    Raises:
        DataError: data are missing, do not fit the model, or calibration and gate share samples.
        RecipeError: the gate names outputs or metrics that the task does not have.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, *, tiny: bool = False) -> None:
        self.checkpoint = checkpoint
        self.tiny = tiny
        self.recipe = recipe
        self.task: Task = make_task(recipe.task)
        self._refuse_unknown_limits()
        checkpoint.processor = recipe.task.processor or checkpoint.processor
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
        labels = any(pass_.needs() & LABELLED for pass_ in self.recipe.edits)
        table = sample(load_table(spec.data, self.task.roles(labels=labels)), spec.samples, spec.seed)
        examples = self.task.encode(table, self.checkpoint, labels=labels)
        self.calibration_digest = table.digest if labels else examples.digest
        return examples

    @property
    def sequence(self) -> int | None:
        """Tokens of the sample that costs are counted for; None where the recipe does not say."""
        sequence = self.recipe.export.sequence
        return None if sequence is None else sequence.opt

    def _refuse_shared_samples(self) -> None:
        seen = self.examples.shared_with(self.calibration)
        if seen > _COINCIDENCE * len(self.examples):
            raise DataError(
                f"{seen} of the gate's {len(self.examples)} samples are also calibration samples",
                expected="different samples: a model that is fitted to its judge always passes",
                fix="calibrate on the training split and judge on the test split",
            )

    def _refuse_unknown_limits(self) -> None:
        """A limit that nothing is compared with would fail every stage, after minutes."""
        gate, own = self.recipe.gate, self.task.metrics()
        if not own:
            return
        outputs = {metric.output for metric in own}
        metrics = {metric.metric for metric in own} | {"fidelity", "agreement"}
        for section, names, known in (("outputs", gate.outputs, outputs), ("metrics", gate.metrics, metrics)):
            for name in names:
                if name not in known:
                    raise RecipeError(
                        f'gate.{section}: the task does not judge "{name}"',
                        expected="one of: " + ", ".join(sorted(known)),
                        fix=did_you_mean(name, known),
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
