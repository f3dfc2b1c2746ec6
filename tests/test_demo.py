"""The demo's parts: model, training, data files and recipe. The whole demo is run by CI, as README.md says it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headwise.calibration.data import load_table
from headwise.demo.model import TwoHeadViT, two_head_vit
from headwise.demo.run import RECIPE
from headwise.demo.train import CALIBRATION, TEST, splits, train, write_data
from headwise.errors import StorageError
from headwise.pipeline.recipe import load_recipe


def test_model_has_two_outputs_and_attention_that_can_be_pruned() -> None:
    model = two_head_vit().eval()
    outputs = model(torch.rand(3, 1, 8, 8))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {"digit": (3, 10), "parity": (3, 2)}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert [layer.num_heads for layer in layers] == [6, 6, 6]


def test_model_sees_every_patch() -> None:
    torch.manual_seed(0)
    model = TwoHeadViT(width=32, heads=2, layers=1).eval()
    pixels = torch.zeros(17, 1, 8, 8)
    for patch in range(16):
        row, column = divmod(patch, 4)
        pixels[patch + 1, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1.0
    digit = model(pixels)["digit"]
    assert torch.pdist(digit).min() > 1e-5


def test_splits_are_disjoint_balanced_halves() -> None:
    train_set, test_set = splits()
    assert (len(train_set["digit"]), len(test_set["digit"])) == (898, 899)
    counts = [np.bincount(part["digit"], minlength=10) for part in (train_set, test_set)]
    assert np.abs(counts[0] - counts[1]).max() <= 1
    assert train_set["pixel_values"].dtype == np.float32
    assert (train_set["pixel_values"].min(), train_set["pixel_values"].max()) == (0.0, 1.0)
    assert np.array_equal(test_set["parity"], test_set["digit"] % 2)
    together = np.concatenate([train_set["pixel_values"], test_set["pixel_values"]]).reshape(1797, -1)
    assert len(np.unique(together, axis=0)) == 1797


def test_training_repeats_itself() -> None:
    before = torch.random.get_rng_state()
    epochs: list[int] = []
    models = [train(0, epochs=1, progress=epochs.append), train(0, epochs=1), train(1, epochs=1)]
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state is left alone"
    assert epochs == [1]
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_learns() -> None:
    _, test_set = splits()
    model = train(0, epochs=8)
    assert not model.training
    with torch.no_grad():
        outputs = model(torch.from_numpy(test_set["pixel_values"]))
    right = {name: (outputs[name].argmax(1).numpy() == test_set[name]).mean() for name in outputs}
    assert right["digit"] > 0.4, "chance is 0.1"
    assert right["parity"] > 0.7, "chance is 0.5"


def test_data_files_are_what_the_recipe_names(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.calibration is not None
    test_set = load_table(recipe.task.data, ("pixel_values", "digit", "parity"))
    calibration = load_table(recipe.calibration.data, ("pixel_values",))
    assert Path(str(recipe.task.data.path)).name == TEST
    assert Path(str(recipe.calibration.data.path)).name == CALIBRATION
    assert (len(test_set), len(calibration)) == (899, 898)
    assert np.array_equal(test_set.columns["digit"], splits()[1]["digit"])
    assert test_set.digest != calibration.digest


def test_data_files_are_the_same_every_time(tmp_path: Path) -> None:
    write_data(tmp_path / "a")
    write_data(tmp_path / "b")
    assert (tmp_path / "a" / TEST).read_bytes() == (tmp_path / "b" / TEST).read_bytes()


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_data(tmp_path / "file")
