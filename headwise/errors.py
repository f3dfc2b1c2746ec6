"""Every exception that headwise raises on purpose.

A message has three parts, always in this order: what was found, what was expected, what to do about it. The exit code
of the command line is a property of the class, so that the same mistake ends every command in the same way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadwiseError(Exception):
    """Base of all headwise errors.

    Args:
        found: what is wrong, with the offending value.
        expected: what would have been right.
        fix: what the reader can do next.
    """

    exit_code = 3

    def __init__(self, found: str, *, expected: str, fix: str) -> None:
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(f"{found}\n  expected: {expected}\n  do this:  {fix}")


class RecipeError(HeadwiseError):
    """The recipe cannot be read or asks for something that does not exist."""

    exit_code = 2


class DataError(HeadwiseError):
    """A data file is missing, empty, has other columns, or does not fit the model."""

    exit_code = 2


class CheckpointError(HeadwiseError):
    """The checkpoint cannot be read, or its weights are not usable numbers."""

    exit_code = 2


class UnsupportedModelError(HeadwiseError):
    """The model has no family record."""

    exit_code = 2


class PlanError(HeadwiseError):
    """A pass cannot apply to this model, or its plan would break the model."""

    exit_code = 2


class TargetError(HeadwiseError):
    """The deployment target does not exist or cannot do what the recipe asks of it."""

    exit_code = 2


class GateError(HeadwiseError):
    """What was asked for needs a run whose gates passed."""

    exit_code = 1


class BundleError(HeadwiseError):
    """The folder is no bundle, its manifest cannot be read, or it does not hold what was asked for."""

    exit_code = 2


class SurgeryError(HeadwiseError):
    """An edit did not land where its plan said, or its exact twin disagrees."""


class ExportError(HeadwiseError):
    """The ONNX graph could not be made, or is not what the model is."""


class EngineError(HeadwiseError):
    """The engine builder refused the graph."""


class StorageError(HeadwiseError):
    """An artifact could not be written or is damaged."""


class MissingDependencyError(HeadwiseError):
    """A package that the requested step needs is not installed."""

    exit_code = 4


class MachineError(HeadwiseError):
    """This machine cannot do the requested step (no GPU, other GPU)."""

    exit_code = 4


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``'did you mean "spearman"?'`` for a near miss, otherwise the list of choices."""
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return "choose one of: " + ", ".join(options)
