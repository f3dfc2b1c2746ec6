"""What is wrong with statistics that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headwise.errors import DataError
from headwise.model.mlp import MlpView
from headwise.model.view import AttentionView


def refuse_broken(values: Mapping[Any, tuple[torch.Tensor, ...]]) -> None:
    """Raise DataError where a statistic, by its name, is not finite."""
    for stat, tensors in values.items():
        for index, tensor in enumerate(tensors):
            if not torch.isfinite(tensor).all():
                raise DataError(
                    f"the statistic {stat} of layer {index} is not finite",
                    expected="finite head outputs and neurons on every calibration sample",
                    fix="look for broken samples in the calibration data, or for a model that overflows",
                )


def did_not_run(layer: AttentionView | MlpView) -> DataError:
    """The error for a layer that no sample reached."""
    return DataError(
        f"layer {layer.index} ({layer.path}) did not run",
        expected="a layer that every sample passes through",
        fix="exclude the layer, or feed the inputs that reach it",
    )
