"""A vision transformer on MNIST with two outputs, digit and parity: trained here, compressed with mnist_vit.yaml.

    python examples/mnist_vit.py --data mnist --out vit
    headwise compress vit --recipe examples/mnist_vit.yaml --out runs/vit

Takes the four idx files of MNIST, compressed or not, and downloads nothing. ``PYTHONPATH=examples`` lets headwise find
the module of the checkpoint again.
"""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from headwise.model.checkpoint import Checkpoint
from headwise.model.saving import save_checkpoint

PATCH, STRIDE, WIDTH, HEADS, LAYERS = 8, 4, 64, 4, 4
SHIFT = 2
MEAN, SPREAD = 0.1307, 0.3081


class MnistViT(nn.Module):
    """28 x 28 pixels as 7 x 7 patches that overlap, and a class token, from which digit and parity are read."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, STRIDE, padding=(PATCH - STRIDE) // 2)
        self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 50, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.digit, self.parity = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 2)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores from images, (B, 1, 28, 28)."""
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        state = self.norm(tokens[:, 0])
        return {"digit": self.digit(state), "parity": self.parity(state)}


def make() -> MnistViT:
    """The untrained model: what a checkpoint of this module names as its source."""
    return MnistViT()


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, compressed or not."""
    path = folder / name
    data = path.read_bytes() if path.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    dims = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(dims)


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 28, 28), normalised, and digits (n,)."""
    images = torch.from_numpy(read_idx(folder, f"{split}-images-idx3-ubyte").astype(np.float32))[:, None]
    return (images / 255 - MEAN) / SPREAD, torch.from_numpy(read_idx(folder, f"{split}-labels-idx1-ubyte").astype(int))


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every image moved by up to two pixels of its own."""
    padded = F.pad(images[:, 0], (SHIFT, SHIFT, SHIFT, SHIFT), value=-MEAN / SPREAD)
    starts = torch.randint(2 * SHIFT + 1, (2, len(images), 1), generator=generator)
    down, right = starts + torch.arange(images.shape[-1])
    return padded[torch.arange(len(images))[:, None, None], down[:, :, None], right[:, None, :]][:, None]


def train(model: MnistViT, images: torch.Tensor, digits: torch.Tensor, *, epochs: int, batch_size: int = 128) -> None:
    """AdamW with one warm-up and one decay, in place."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        order, total = torch.randperm(len(images), generator=generator), 0.0
        for chosen in order[: steps // epochs * batch_size].split(batch_size):
            outputs = model(shifted(images[chosen], generator))
            parity = F.cross_entropy(outputs["parity"], digits[chosen] % 2)
            loss = F.cross_entropy(outputs["digit"], digits[chosen]) + 0.5 * parity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        click.echo(f"epoch {epoch + 1}: mean loss {total * epochs / steps:.4f}")


def save_data(folder: Path, name: str, images: torch.Tensor, digits: torch.Tensor) -> None:
    """What the recipe reads: inputs and labels by the names of the model's."""
    np.savez_compressed(folder / name, image=images.numpy(), digit=digits.numpy(), parity=(digits % 2).numpy())


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of the idx files.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoint and data.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(data: Path, out: Path, epochs: int, threads: int) -> None:
    """Train, report the accuracy of both outputs, and save the checkpoint with the data that the recipe reads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, digits = read_split(data, "train")
    held, test = slice(55_000, None), read_split(data, "t10k")
    model, start = make(), time.perf_counter()
    train(model, images[:55_000], digits[:55_000], epochs=epochs)
    model.eval().requires_grad_(False)
    for name, (inputs, labels) in {"held out": (images[held], digits[held]), "test": test}.items():
        found = [model(part) for part in inputs.split(500)]
        right = [torch.cat([scores["digit"].argmax(1) for scores in found]) == labels]
        right.append(torch.cat([scores["parity"].argmax(1) for scores in found]) == labels % 2)
        click.echo(f"{name}: digit {100 * right[0].float().mean():.2f}, parity {100 * right[1].float().mean():.2f}")
    click.echo(f"{time.perf_counter() - start:.0f} s")
    factory = "mnist_vit:make"
    checkpoint = Checkpoint(module=model, source=factory, kind="module", digest="", factory=factory)
    save_checkpoint(checkpoint, checkpoint.view(), out)
    save_data(out, "calibration.npz", images[:2000], digits[:2000])
    save_data(out, "dev.npz", images[held], digits[held])
    save_data(out, "test.npz", *test)


if __name__ == "__main__":
    main()
