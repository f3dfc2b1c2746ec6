"""The safetensors files of a checkpoint directory, read tensor by tensor and written shard by shard."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headwise.artifacts import digest_json, storage_error, write_atomic
from headwise.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class Shards:
    """The tensors of a directory; none is in memory before it is read.

    Attributes:
        folder: the directory.
        files: name of a tensor -> the file that holds it.
    """

    def __init__(self, folder: Path) -> None:
        """Raises:
        CheckpointError: there are no safetensors files, or one of them cannot be read.
        """
        self.folder = folder
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                self.files |= dict.fromkeys(file.keys(), path)
        if not self.files:
            raise CheckpointError(
                f"{folder} holds no *.safetensors file",
                expected="weights in safetensors, which are read a layer at a time",
                fix="load the model with transformers and save it again with save_pretrained",
            )

    def digest(self) -> str:
        """Digest of names, sizes and times of change of files and ``config.json``: contents would take minutes."""
        files = sorted({*self.files.values(), self.folder / "config.json"})
        facts = {path.name: path.stat() for path in files if path.exists()}
        return digest_json({name: [stat.st_size, stat.st_mtime_ns] for name, stat in facts.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        with _opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, from its file's header."""
        with _opened(self.files[name]) as file:
            found: torch.dtype = file.get_slice(name)[:0].dtype
            return found

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """These tensors, as they are stored; each file is opened once.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        found: dict[str, torch.Tensor] = {}
        by_file: defaultdict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        for path, wanted in by_file.items():
            with _opened(path) as file:
                # Copies: a tensor that stays a part of the mapped file keeps all its pages in memory.
                found |= {name: file.get_tensor(name).clone() for name in wanted}
        for name, tensor in found.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{self.folder}: {name} holds NaN or infinite values",
                    expected="finite weights",
                    fix="use a checkpoint from before the training diverged",
                )
        return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            expected="a file that safetensors wrote",
            fix="copy or download the file again",
        ) from error


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it.

    Raises:
        StorageError: the disk is full or the folder is not writable; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary), {"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        # A full disk comes from safetensors as an error of its own.
        raise storage_error(error if isinstance(error, OSError) else OSError(str(error)), path) from error


def write_index(folder: Path, shards: Collection[Path]) -> int:
    """Write the index of these files of a folder; returns the bytes of all tensors."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in shards:
        with _opened(path) as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
        total += path.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomic(folder / INDEX, json.dumps(index, indent=2))
    return total
