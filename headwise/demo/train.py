"""Trains the demo's model on scikit-learn's handwritten digits, and writes the data files that its recipe names."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from headwise.artifacts import write_atomic
from headwise.demo.model import TwoHeadViT, two_head_vit

Arrays = dict[str, NDArray[Any]]

CALIBRATION = "calibration.npz"
TEST = "test.npz"
EPOCHS = 80
_BATCH = 32
_RATE = 4e-3


def splits() -> tuple[Arrays, Arrays]:
    """The digits as two halves with the same share of every digit: one to train and calibrate with, one to judge with.

    Half of the data is kept for the gate: a smaller set could not tell a loss of one point from noise.

    Returns:
        (train, test); each has ``pixel_values`` (n, 1, 8, 8) float32 in 0 to 1, ``digit`` and ``parity`` (n,) int64.
    """
    images, digits = load_digits(return_X_y=True)
    pixels = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    halves = train_test_split(pixels, digits.astype(np.int64), test_size=0.5, stratify=digits, random_state=0)
    train_pixels, test_pixels, train_digits, test_digits = halves
    return _arrays(train_pixels, train_digits), _arrays(test_pixels, test_digits)


def _arrays(pixels: NDArray[Any], digits: NDArray[Any]) -> Arrays:
    return {"pixel_values": pixels, "digit": digits, "parity": digits % 2}


def train(seed: int = 0, *, epochs: int = EPOCHS, progress: Callable[[int], None] | None = None) -> TwoHeadViT:
    """Train the model from scratch. The same seed on the same machine gives the same weights.

    It runs on one thread: the model is too small to gain much from a second one, the result does not depend on the
    number of cores, and a busy machine does not slow it down out of proportion.

    Args:
        seed: of the initial weights, the batches and the augmentation; the caller's random state is left alone.
        epochs: passes over the 898 training images.
        progress: called with the number of finished epochs.

    Returns:
        The trained model in eval mode, on the CPU.
    """
    data, _ = splits()
    pixels, digits = torch.from_numpy(data["pixel_values"]), torch.from_numpy(data["digit"])
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = two_head_vit().train()
        average = get_ema_multi_avg_fn(0.99)
        averaged = AveragedModel(model, multi_avg_fn=average)
        steps = epochs * math.ceil(len(pixels) / _BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=steps, pct_start=0.1)
        for epoch in range(epochs):
            for rows in torch.split(torch.randperm(len(pixels)), _BATCH):
                loss = _loss(model(_distort(pixels[rows])), digits[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                averaged.update_parameters(model)
            if progress is not None:
                progress(epoch + 1)
    trained = averaged.module
    assert isinstance(trained, TwoHeadViT)
    return trained.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loss(outputs: dict[str, Tensor], digits: Tensor) -> Tensor:
    digit = functional.cross_entropy(outputs["digit"], digits, label_smoothing=0.1)
    return digit + 0.5 * functional.cross_entropy(outputs["parity"], digits % 2, label_smoothing=0.1)


def _distort(pixels: Tensor) -> Tensor:
    """Turn, scale, slant and shift every image a little: 898 images are too few to learn these from."""
    n = len(pixels)
    angle, slant = (torch.rand(2, n) - 0.5) * 0.4
    scale = 1 + (torch.rand(n) - 0.5) * 0.25
    shift = (torch.rand(n, 2) - 0.5) * 0.25
    top = torch.stack([scale * angle.cos(), -angle.sin() + slant, shift[:, 0]], dim=1)
    bottom = torch.stack([angle.sin(), scale * angle.cos(), shift[:, 1]], dim=1)
    grid = functional.affine_grid(torch.stack([top, bottom], dim=1), list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, align_corners=False)


def write_data(folder: Path) -> None:
    """Write ``calibration.npz`` (the images it was trained on) and ``test.npz`` (images it never saw) to ``folder``.

    Raises:
        StorageError: the folder cannot be written.
    """
    for name, arrays in zip((CALIBRATION, TEST), splits(), strict=True):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(folder / name, buffer.getvalue())
