"""The passes of a recipe on one block after the other, with one block in memory.

Every pass has a stream of hidden states: what the calibration samples are in front of the next block, in a model that
has gone through the passes up to this one; the first stream is that of the untouched model. A pass reads the statistics
of the stream before it, as it does where the whole model is in memory, and refits on its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from headwise.calibration.tasks import Examples, Task
from headwise.errors import DataError, HeadwiseError
from headwise.model.blocks import Block, BlockSource, HiddenStates
from headwise.model.edits import EditPlan
from headwise.model.forward import to_torch
from headwise.model.layout import Layout
from headwise.model.view import ModelView
from headwise.passes.base import Pass, edit, repair
from headwise.passes.checks import refuse_changed, versions_outside
from headwise.passes.recovery import Progress, refit

_READ = {"input_ids", "attention_mask"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """One block behind all passes.

    Attributes:
        tensors: its weights, by their names in the whole model.
        streams: what the next block is given, one per pass and the untouched model's first.
        layout: the heads and neurons that it has now.
        record: plans, refits and differences, for the report.
    """

    tensors: Mapping[str, torch.Tensor]
    streams: list[HiddenStates]
    layout: Layout
    record: Mapping[str, Any]


class Blockwise:
    """Converts the blocks of a source, in order.

    Attributes:
        source: the untouched model.
        passes: the passes, each with what it is for every layer by itself.
        examples: calibration samples as numbers of stored samples.
    """

    def __init__(
        self, source: BlockSource, passes: Sequence[Pass], task: Task, examples: Examples, options: Mapping[str, Any]
    ) -> None:
        """Args:
        source: the untouched model.
        passes: in order.
        task: what the samples are for.
        examples: calibration samples, with token ids.
        options: ``batch_size`` and ``seed``.

        Raises:
            PlanError: a pass cannot treat a layer by itself.
            DataError: the samples are something else than token ids.
        """
        self.source = source
        self.passes = [(pass_, pass_.by_layer(source.view)) for pass_ in passes]
        self.task = task
        self.tokens = _token_ids(examples)
        self.examples = _stored(examples)
        self._batch_size, self._seed = options["batch_size"], options["seed"]

    def start(self) -> list[HiddenStates]:
        """What the first block is given."""
        first = self.source.embed(self.tokens)
        return [first] * (1 + len(self.passes))

    def convert(self, index: int, streams: list[HiddenStates], progress: Progress | None = None) -> Converted:
        """Take one block through all passes.

        Args:
            index: which block.
            streams: what it is given.
            progress: see ``Progress``.

        Raises:
            HeadwiseError: what ``run_pass`` raises.
        """
        start = time.perf_counter()
        untouched = self.source.block(index, streams[0])
        block = untouched.twin()
        teacher, view = self.source.open(untouched, index), self.source.open(block, index)
        behind, records = [self._behind(untouched)], []
        with _named(index):
            for number in range(1, 1 + len(self.passes)):
                records.append(self._apply(number, index, (view, teacher), streams, progress))
                if number == len(self.passes):
                    self.source.round(block, index)
                block.states = streams[number]
                behind.append(self._behind(block))
        return Converted(
            tensors=self.source.tensors(block, index),
            streams=behind,
            layout=view.layout,
            record={
                "layer": index,
                "passes": records,
                "drift": _difference(behind[-1], behind[0]),
                "seconds": time.perf_counter() - start,
            },
        )

    def _apply(
        self,
        number: int,
        index: int,
        views: tuple[ModelView, ModelView],
        streams: list[HiddenStates],
        progress: Progress | None,
    ) -> dict[str, Any]:
        """One pass on one block, in place."""
        pass_, by_layer = self.passes[number - 1]
        alone = by_layer[index]
        view, teacher = views
        assert isinstance(view.module, Block), "opened by the source"
        given: dict[str, Any] = {"batch_size": self._batch_size, "progress": progress}
        bystanders = versions_outside(view)
        plan, twin_error, fits = EditPlan(edits=()), 0.0, []
        if alone is not None:
            view.module.states = streams[number - 1]
            edited = edit(alone, view, self.task, self.examples, seed=self._seed, **given)
            view.module.states = streams[number]
            fits = repair(alone, edited, view, teacher, self.examples, **given)
            plan, twin_error = _renumbered(edited.plan, index), edited.twin_error
        elif any(by_layer[:index]):
            # Behind an edited layer, those that stay as they are make good what it lost, too.
            recovery = pass_.recovery()
            view.module.states = streams[number]
            if recovery is not None and recovery.refit:
                fits = refit(view, teacher, view.sublayers, recovery, self.examples, missed={}, **given)
        refuse_changed(view, bystanders)
        return {
            "name": pass_.name,
            "plan": plan.to_json(),
            "twin_error": twin_error,
            "refit": [{**fit, "layer": index} for fit in fits],
        }

    def _behind(self, block: Block) -> HiddenStates:
        """What a block makes of what it is given."""
        found = block.states.like()
        with torch.inference_mode():
            for batch in self.examples.batches(self._batch_size):
                inputs = to_torch(batch.inputs)
                found.put(inputs["row"], block(**inputs))
        return found


def _token_ids(examples: Examples) -> list[torch.Tensor]:
    names = set(examples.rows[0])
    if "input_ids" not in names or names - _READ:
        raise DataError(
            f"the calibration samples are {', '.join(sorted(names))}",
            expected="token ids, which are looked up in the model's embeddings: a task whose data are text",
            fix="use language-modeling or fidelity with a text column",
        )
    return [torch.as_tensor(row["input_ids"]) for row in examples.rows]


def _stored(examples: Examples) -> Examples:
    """The samples by number, with their masks."""
    rows = tuple(
        {
            "row": np.asarray(number, dtype=np.int64),
            "attention_mask": np.asarray(row.get("attention_mask", np.ones_like(row["input_ids"]))),
        }
        for number, row in enumerate(examples.rows)
    )
    return replace(examples, rows=rows, labels={}, padding={"attention_mask": 0.0})


def _renumbered(plan: EditPlan, index: int) -> EditPlan:
    """The plan of a block, as one of the whole model."""
    edits = tuple(replace(edit, layer=index) for edit in plan.edits)
    return replace(plan, edits=edits, notes={index + layer: note for layer, note in plan.notes.items()})


def _difference(found: HiddenStates, wanted: HiddenStates) -> float:
    """Squared difference of two streams relative to the second one's energy."""
    energy = sum(float(part.double().square().sum()) for part in wanted.flat.split(1024))
    pairs = zip(found.flat.split(1024), wanted.flat.split(1024), strict=True)
    return sum(float((ours - theirs).double().square().sum()) for ours, theirs in pairs) / max(energy, 1e-300)


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Errors about a model of one layer as errors about this layer."""
    try:
        yield
    except HeadwiseError as error:
        raise type(error)(
            f"block {index}, as a model of its own: {error.found}", expected=error.expected, fix=error.fix
        ) from error
