"""Metrics over whole sets of samples, vectorised so that a thousand resamples take seconds.

Every function reads predictions (..., n) or (..., n, 2) and labels (..., n), and gives (...): one number per set. They
agree with scipy and scikit-learn (tests compare them), which only take one set at a time.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from headwise.errors import DataError, did_you_mean

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How a set of predictions becomes a number.

    Attributes:
        name: as in a recipe.
        unit: ``points`` (of 100), ``nats``, or empty for the metric's own unit.
        higher_is_better: direction.
        scale: factor from what ``fn`` gives to the unit; 100 for points.
        fn: (predictions, labels) -> one number per set.
        vectorised: whether ``fn`` takes leading axes; otherwise it is called set by set.
    """

    name: str
    unit: str
    higher_is_better: bool
    fn: Callable[[Array, Array | None], Any]
    scale: float = 1.0
    vectorised: bool = True

    def of(self, predictions: Array, labels: Array | None) -> float:
        """The metric of one set, in its unit; NaN where it is not defined."""
        return float(self.fn(predictions, labels)) * self.scale

    def resampled(self, predictions: Array, labels: Array | None, indices: Array) -> Array:
        """The metric of several predictions on the same resamples, in its unit.

        Args:
            predictions: (models, n, ...).
            labels: (n, ...) or None.
            indices: (resamples, n) which samples each resample holds.

        Returns:
            (models, resamples).
        """
        if self.vectorised:
            drawn = None if labels is None else labels[indices]
            return np.asarray(self.fn(predictions[:, indices], drawn)) * self.scale
        values = [[self.fn(p[i], None if labels is None else labels[i]) for i in indices] for p in predictions]
        return np.asarray(values, dtype=np.float64) * self.scale


def find_metric(name: str, *, higher_is_better: bool = True) -> Metric:
    """A metric by its name, or the user's ``module:function`` (predictions, labels) -> float.

    Args:
        name: as in a recipe.
        higher_is_better: direction of a ``module:function`` metric.

    Raises:
        DataError: there is no such metric, or the function cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise DataError(
            f'there is no metric "{name}"',
            expected="a metric of headwise or module:function",
            fix=did_you_mean(name, METRICS),
        )
    if os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        fn: Callable[[Array, Array | None], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"the metric {name} cannot be imported: {error}",
            expected="module:function, a function of (predictions, labels) that returns a number",
            fix="run from the folder that holds the module, or install it",
        ) from error
    return Metric(name=name, unit="", higher_is_better=higher_is_better, fn=fn, vectorised=False)


def _mean(predictions: Array, labels: Array | None) -> Array:
    del labels
    return np.asarray(predictions.mean(axis=-1))


def _pearson(predictions: Array, labels: Array | None) -> Array:
    assert labels is not None
    left = predictions - predictions.mean(axis=-1, keepdims=True)
    right = labels - labels.mean(axis=-1, keepdims=True)
    lengths = np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))
    # Rounding leaves constant values with a tiny spread; their correlation is not defined.
    constant = (np.ptp(predictions, axis=-1) == 0) | (np.ptp(labels, axis=-1) == 0) | (lengths == 0)
    return np.asarray((left * right).sum(axis=-1) / np.where(constant, np.nan, lengths))


def _spearman(predictions: Array, labels: Array | None) -> Array:
    assert labels is not None
    return _pearson(rankdata(predictions, axis=-1), rankdata(labels, axis=-1))


def _accuracy(predictions: Array, labels: Array | None) -> Array:
    return np.asarray((predictions == labels).mean(axis=-1))


def _counts(values: Array, classes: int) -> Array:
    """(..., n) class ids -> (..., classes) how often each occurs."""
    sets = values.reshape(-1, values.shape[-1])
    shifted = sets + classes * np.arange(len(sets))[:, None]
    counts = np.bincount(shifted.ravel(), minlength=classes * len(sets))
    return counts.reshape(*values.shape[:-1], classes).astype(np.float64)


def _class_counts(predictions: Array, labels: Array | None) -> tuple[Array, Array, Array]:
    """(..., classes) each: correct, predicted, and true samples of every class."""
    assert labels is not None
    predicted, true = predictions.astype(np.int64), np.broadcast_to(labels, predictions.shape).astype(np.int64)
    classes = int(max(predicted.max(), true.max())) + 1
    correct = np.where(predicted == true, predicted, classes)
    return _counts(correct, classes + 1)[..., :-1], _counts(predicted, classes), _counts(true, classes)


def _f1(predictions: Array, labels: Array | None) -> Array:
    """Mean over the classes that occur in labels or predictions, as in scikit-learn's macro average."""
    correct, predicted, true = _class_counts(predictions, labels)
    total = predicted + true
    scores = 2 * correct / np.where(total == 0, 1, total)
    return np.asarray(scores.sum(axis=-1) / (total > 0).sum(axis=-1))


def _matthews(predictions: Array, labels: Array | None) -> Array:
    """Zero for a constant prediction, as is the convention; not defined for constant labels."""
    correct, predicted, true = _class_counts(predictions, labels)
    n = true.sum(axis=-1)
    covariance = correct.sum(axis=-1) * n - (predicted * true).sum(axis=-1)
    spread_predicted, spread_true = n**2 - (predicted**2).sum(axis=-1), n**2 - (true**2).sum(axis=-1)
    lengths = np.sqrt(np.where(spread_predicted == 0, 1, spread_predicted) * spread_true)
    return np.asarray(covariance / np.where(spread_true == 0, np.nan, lengths))


def _mse(predictions: Array, labels: Array | None) -> Array:
    return np.asarray(((predictions - labels) ** 2).mean(axis=-1))


def _mae(predictions: Array, labels: Array | None) -> Array:
    return np.asarray(np.abs(predictions - labels).mean(axis=-1))


def _r2(predictions: Array, labels: Array | None) -> Array:
    assert labels is not None
    spread = labels.var(axis=-1)
    return np.asarray(1 - _mse(predictions, labels) / np.where(spread == 0, np.nan, spread))


def _nats(predictions: Array, labels: Array | None) -> Array:
    del labels
    sums = predictions.sum(axis=-2)
    return np.asarray(sums[..., 0] / sums[..., 1])


def _perplexity(predictions: Array, labels: Array | None) -> Array:
    return np.asarray(np.exp(_nats(predictions, labels)))


def _points(name: str, fn: Callable[[Array, Array | None], Array]) -> Metric:
    return Metric(name=name, unit="points", higher_is_better=True, scale=100.0, fn=fn)


def _loss(name: str, unit: str, fn: Callable[[Array, Array | None], Array]) -> Metric:
    return Metric(name=name, unit=unit, higher_is_better=False, fn=fn)


_ALL = (
    _points("spearman", _spearman),
    _points("pearson", _pearson),
    _points("accuracy", _accuracy),
    _points("f1", _f1),
    _points("matthews", _matthews),
    _points("r2", _r2),
    _points("fidelity", _mean),
    _points("agreement", _mean),
    _loss("mse", "", _mse),
    _loss("mae", "", _mae),
    _loss("nats", "nats", _nats),
    _loss("perplexity", "", _perplexity),
)
METRICS = {metric.name: metric for metric in _ALL}
