"""Convert a checkpoint block by block, from safetensors to safetensors: for models that do not fit in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors.torch import load_file

from headwise.artifacts import digest_json, storage_error, write_atomic
from headwise.calibration.data import load_table, sample
from headwise.calibration.tasks import Examples, Task, make_task
from headwise.errors import CheckpointError, RecipeError, StorageError
from headwise.model import surgery
from headwise.model.blocks import BlockSource, HiddenStates
from headwise.model.checkpoint import SIDECAR, Checkpoint
from headwise.model.layout import Layout
from headwise.model.saving import save_checkpoint
from headwise.model.shards import write_index, write_shard
from headwise.pipeline.commands.blockwise import Blockwise
from headwise.pipeline.monitor import Monitor, Silent, Steps
from headwise.pipeline.recipe import Recipe, load_recipe
from headwise.pipeline.store import source_digest, versions

REPORT = "conversion.json"
_WORK = ".conversion"
_STATE = "state.json"


def convert(
    checkpoint: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = True,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Apply the passes of a recipe with one block of the model in memory.

    Nothing is judged: the recipe's gate, export and targets are left out.

    Args:
        checkpoint: a directory with safetensors files.
        recipe: as for ``compress``; its passes have to treat every layer by itself.
        out: folder for the result, which ``headwise.load`` reads, and ``conversion.json``.
        overrides: ``key.path=value`` changes to the recipe.
        resume: go on behind the last block that an interrupted conversion finished.
        monitor: receives progress.

    Returns:
        The content of ``conversion.json``.

    Raises:
        HeadwiseError: checkpoint, recipe or data cannot be used, a pass failed, or the disk is full.
    """
    watcher: Monitor = monitor or Silent()
    watcher.start("load")
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    _refuse_recipe(resolved)
    source, shown = _open(Path(checkpoint), Path(out))
    task, examples = _calibration(resolved, shown)
    options = {"batch_size": resolved.batch_size, "seed": resolved.seed}
    blocks = Blockwise(source, resolved.edits, task, examples, options)
    key = {**_key(shown, resolved, examples), **options}
    files = len(source) + len(source.others())
    folder = _Folder(Path(out), digest_json(key), files, resume=resume)
    if folder.finished is not None:
        return folder.finished
    folder.require_room(source)
    _convert_layers(blocks, folder, watcher)
    watcher.start("rest")
    layout = folder.layout()
    before = source.view.layout
    rest = folder.copy_rest(source)
    surgery.reshape(source.view, layout)
    save_checkpoint(shown, source.view, Path(out), weights=False)
    return folder.finish(
        rest,
        {
            "source": shown.source,
            "passes": key["passes"],
            "before": before.to_json(),
            "after": layout.to_json(),
            "calibration": {"source": examples.source, "digest": examples.digest, "samples": len(examples)},
        },
    )


def _key(checkpoint: Checkpoint, recipe: Recipe, examples: Examples) -> dict[str, Any]:
    """What a conversion depends on, beside batch size and seed."""
    return {
        "checkpoint": checkpoint.digest,
        "passes": recipe.to_json()["passes"],
        "calibration": examples.digest,
        "task": recipe.task.model_dump(mode="json", exclude={"data"}),
        **versions("torch"),
        "headwise": source_digest(),
    }


def _convert_layers(blocks: Blockwise, folder: _Folder, watcher: Monitor) -> None:
    """Convert and write every block that is not done yet."""
    streams, count = folder.continue_from(blocks), len(blocks.source)
    for index in range(len(folder.layers), count):
        watcher.start(f"layer {index + 1}/{count}")
        converted = blocks.convert(index, streams, Steps(watcher, len(blocks.examples)))
        folder.add(index, converted.tensors, converted.layout, converted.record)
        streams, drift = converted.streams, converted.record["drift"]
        # Nothing of this layer is to be in memory beside the next one.
        del converted
        folder.keep(streams)
        watcher.finish(f"layer {index + 1}/{count}", f"differs by {drift:.2%}")


def _refuse_recipe(recipe: Recipe) -> None:
    if not recipe.edits:
        raise RecipeError(
            "the recipe has no pass that edits the model",
            expected="share-kv or latent-kv",
            fix="add one to passes",
        )
    names = [pass_.name for pass_ in recipe.edits]
    if recipe.quantize is not None or len(set(names)) < len(names):
        raise RecipeError(
            f"passes are {', '.join(pass_.name for pass_ in recipe.passes)}",
            expected="every pass once, and no quantize, which works on a graph",
            fix="leave out what `headwise convert` cannot do; `headwise compress` exports and quantizes",
        )


def _open(folder: Path, out: Path) -> tuple[BlockSource, Checkpoint]:
    """The model block by block, and a checkpoint without weights that knows its tokenizer."""
    if not folder.is_dir() or folder.resolve() == out.resolve():
        raise CheckpointError(
            f"{folder} is {'also --out' if folder.is_dir() else 'not a directory'}",
            expected="a directory with config.json and safetensors files, which are read block by block",
            fix="give another --out" if folder.is_dir() else "download the checkpoint first and name its directory",
        )
    sidecar = folder / SIDECAR
    layout = Layout.from_json(json.loads(sidecar.read_text())["layout"]) if sidecar.exists() else None
    source = BlockSource(folder, layout)
    digest = source.shards.digest()
    shown = Checkpoint(
        module=source.skeleton, source=str(folder), kind="transformers", digest=digest, folder=folder, layout=layout
    )
    return source, shown


def _calibration(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Task, Examples]:
    task, spec = make_task(recipe.task), recipe.calibration
    assert spec is not None, "a recipe with passes has calibration data"
    checkpoint.processor = recipe.task.processor
    table = sample(load_table(spec.data, task.roles(labels=False)), spec.samples, spec.seed)
    return task, task.encode(table, checkpoint, labels=False)


class _Folder:
    """The result while it grows; a killed conversion goes on behind the last block that is whole.

    Attributes:
        layers: the records of the blocks that are done.
        finished: the report of a conversion with the same key that came to its end.
    """

    def __init__(self, out: Path, key: str, files: int, *, resume: bool) -> None:
        self._out, self._key, self._files = out, key, files
        self._work = out / _WORK
        self.layers: list[dict[str, Any]] = []
        self.finished: dict[str, Any] | None = None
        state = _read(self._work / _STATE)
        report = _read(out / REPORT)
        ours = bool(state or report)
        if out.exists() and any(out.iterdir()) and not ours:
            raise StorageError(
                f"{out} holds something else than a conversion",
                expected="an empty folder, or one that a conversion was interrupted in",
                fix="choose another --out, or empty the folder",
            )
        if resume and report.get("key") == key and self._whole(report["layers"]):
            self.finished = report
        elif resume and state.get("key") == key and self._whole(state["layers"]):
            self.layers = state["layers"]
        elif ours:
            _empty(out)
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, out) from error
        if self.finished is not None:
            shutil.rmtree(self._work)

    def _whole(self, layers: Sequence[Mapping[str, Any]]) -> bool:
        files = [(self._out / layer["file"], layer["bytes"]) for layer in layers]
        return all(path.exists() and path.stat().st_size == size for path, size in files)

    def require_room(self, source: BlockSource) -> None:
        """Raise StorageError where the result would not fit, unless it is much smaller than the source."""
        whole = sum(path.stat().st_size for path in set(source.shards.files.values()))
        needed = whole - sum(layer["bytes"] for layer in self.layers)
        free = shutil.disk_usage(self._out).free
        if free < needed:
            raise StorageError(
                f"{free / 1e9:.1f} GB are free for {self._out}",
                expected=f"{needed / 1e9:.1f} GB, what the checkpoint has",
                fix="free some space, or choose another --out",
            )

    def continue_from(self, blocks: Blockwise) -> list[HiddenStates]:
        """What the first block that is missing is given."""
        streams = blocks.start()
        if not self.layers:
            return streams
        stored = load_file(str(self._states(len(self.layers))))
        found = []
        for number, stream in enumerate(streams):
            found.append(stream.like())
            found[-1].flat = stored[str(number)]
        return found

    def add(self, index: int, tensors: Mapping[str, Any], layout: Layout, record: Mapping[str, Any]) -> None:
        """Write a block."""
        path = self._shard(index)
        write_shard(path, tensors)
        entry = {"file": path.name, "bytes": path.stat().st_size, "layout": layout.to_json(), **record}
        self.layers.append(entry)

    def keep(self, streams: Sequence[HiddenStates]) -> None:
        """Write what the next block is given, and then that the block before is done."""
        done = len(self.layers)
        write_shard(self._states(done), {str(number): stream.flat for number, stream in enumerate(streams)})
        write_atomic(self._work / _STATE, json.dumps({"key": self._key, "layers": self.layers}))
        self._states(done - 1).unlink(missing_ok=True)

    def layout(self) -> Layout:
        """Of all blocks."""
        parts = [Layout.from_json(layer["layout"]) for layer in self.layers]
        return Layout(
            attention=tuple(entry for part in parts for entry in part.attention),
            mlp=tuple(entry for part in parts for entry in part.mlp),
        )

    def copy_rest(self, source: BlockSource) -> list[Path]:
        """Write what belongs to no block as it is, one file per tensor, so that only one is in memory."""
        paths = []
        for number, name in enumerate(source.others()):
            paths.append(self._shard(len(source) + number))
            write_shard(paths[-1], source.shards.read([name]))
        return paths

    def finish(self, rest: Sequence[Path], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write the index and the report, which says that the result is whole."""
        stock = json.loads((self._out / SIDECAR).read_text())["stock"]
        size = write_index(self._out, [*rest, *(self._out / layer["file"] for layer in self.layers)])
        report = {"schema": 1, "key": self._key, **facts, "stock": stock, "bytes": size, "layers": self.layers}
        write_atomic(self._out / REPORT, json.dumps(report, indent=2))
        shutil.rmtree(self._work)
        return report

    def _shard(self, index: int) -> Path:
        return self._out / f"model-{index + 1:05d}-of-{self._files:05d}.safetensors"

    def _states(self, done: int) -> Path:
        return self._work / f"states-{done:05d}.safetensors"


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of a conversion; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
        return found if "layers" in found else {}
    except (OSError, ValueError, TypeError):
        return {}


def _empty(out: Path) -> None:
    """Take away what another conversion left."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def conversion_table(report: Mapping[str, Any]) -> Table:
    """The layers before and after, for a terminal."""
    table = Table("layer", "kv heads", "kv numbers per token", "refit error", "differs by")
    before, after = (Layout.from_json(report[name]).attention for name in ("before", "after"))
    for old, new, layer in zip(before, after, report["layers"], strict=True):
        fits = [fit for entry in layer["passes"] for fit in entry["refit"]]
        table.add_row(
            str(layer["layer"]),
            f"{len(old.kv)} -> {len(new.kv)}",
            f"{old.kv_width:,} -> {new.kv_width:,}",
            ", ".join(f"{fit['before']:.2%} -> {fit['after']:.2%}" for fit in fits),
            f"{layer['drift']:.2%}",
        )
    return table
