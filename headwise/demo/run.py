"""``headwise demo``: train, save, and run the pipeline on the result."""

from __future__ import annotations

import shutil
from pathlib import Path

from headwise.artifacts import digest_bytes, storage_error
from headwise.demo.train import EPOCHS, train, write_data
from headwise.model.checkpoint import SIDECAR, Checkpoint
from headwise.model.saving import save_checkpoint
from headwise.pipeline.monitor import Monitor
from headwise.pipeline.run import Run, compress

FACTORY = "headwise.demo.model:two_head_vit"
RECIPE = Path(__file__).with_name("recipe.yaml")


def run_demo(folder: Path, monitor: Monitor) -> Run:
    """Train the two-headed model into ``folder/checkpoint``, write its data and recipe, and compress it.

    A model that is already there is used again, so that an interrupted demo continues.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RECIPE, folder / "recipe.yaml")
    except OSError as error:
        raise storage_error(error, folder) from error
    write_data(folder)
    checkpoint = folder / "checkpoint"
    if not (checkpoint / SIDECAR).exists():
        monitor.start("train")
        advance = monitor.work("epochs on scikit-learn's digits", EPOCHS)
        module = train(epochs=EPOCHS, progress=lambda _: advance(1))
        trained = Checkpoint(module=module, source=FACTORY, kind="module", digest=digest_bytes(b""), factory=FACTORY)
        save_checkpoint(trained, trained.view(), checkpoint)
        monitor.finish("train", f"saved to {checkpoint}")
    return compress(checkpoint, folder / "recipe.yaml", folder / "run", monitor=monitor)
