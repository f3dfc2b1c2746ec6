"""Label columns as numbers and class ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headwise.calibration.data import Table
from headwise.calibration.tasks.examples import Array
from headwise.errors import DataError, did_you_mean


def numbers(table: Table, role: str) -> Array:
    """A label column as float64, one number per row.

    Raises:
        DataError: a value is not a finite number.
    """
    array = np.array([_number(value) for value in table.columns[role]])
    bad = ~np.isfinite(array)
    if bad.any():
        raise _unusable(table, role, int(np.argmax(bad)), "a finite number")
    return array


def class_ids(
    table: Table, role: str, *, classes: Sequence[str] | None, label2id: Mapping[str, int]
) -> tuple[Array, int | None]:
    """A label column as class ids from 0.

    Names become ids by ``classes``, else by the model's ``label2id``, else in sorted order; numbers are ids already.

    Returns:
        The ids (n,) int64; and the number of classes, where ``classes`` or the names in the data decide it.

    Raises:
        DataError: a name is not among ``classes``, or a number is not a class id.
    """
    values = table.columns[role]
    names = [str(value) for value in values]
    if classes is not None:
        order = {name: index for index, name in enumerate(classes)}
        strange = next((row for row, name in enumerate(names) if name not in order), None)
        if strange is not None:
            raise DataError(
                f'{table.source}: row {strange} has the label "{names[strange]}", which is not among the classes',
                expected="one of the names in the recipe's classes",
                fix=did_you_mean(names[strange], classes),
            )
        return np.array([order[name] for name in names], dtype=np.int64), len(order)
    if isinstance(values, list) and set(names) <= set(label2id):
        return np.array([label2id[name] for name in names], dtype=np.int64), None
    if isinstance(values, list) and not all(np.isfinite(_number(name)) for name in names):
        order = {name: index for index, name in enumerate(sorted(set(names)))}
        return np.array([order[name] for name in names], dtype=np.int64), len(order)
    array = numbers(table, role)
    wrong = (array < 0) | (array != np.floor(array))
    if wrong.any():
        raise _unusable(table, role, int(np.argmax(wrong)), "a class id, a whole number from 0")
    return array.astype(np.int64), None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _unusable(table: Table, role: str, row: int, expected: str) -> DataError:
    return DataError(
        f'{table.source}: row {row} has the label {table.columns[role][row]!r} in the column for "{role}"',
        expected=expected,
        fix="repair that row, or map another column in data.columns",
    )
