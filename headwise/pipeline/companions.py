"""The files beside a graph that tell serving code what it takes and gives: configuration, tokenizer, processor."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from headwise.errors import DataError
from headwise.model.checkpoint import Checkpoint
from headwise.model.sources import quietly

_CONFIG = ("config.json", "generation_config.json")
_PROCESSOR = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)


def write_companions(untouched: Checkpoint, model: Path | None, folder: Path) -> None:
    """Write them into a folder; nothing for a plain PyTorch model without a processor.

    Files of a directory are copied as they are, so that every version of transformers that read them still does.

    Args:
        untouched: has the tokenizer or the image processor.
        model: directory of the compressed model, whose configuration it is; None for the untouched one.
        folder: made where there is something to write.
    """
    source = model or untouched.folder
    if source is not None:
        _copy(source, _CONFIG, folder)
    elif untouched.kind == "transformers":
        _save_config(untouched, folder)
    home = untouched.home
    if home is None:
        return
    if Path(home).is_dir():
        _copy(Path(home), _PROCESSOR, folder)
        return
    with quietly():
        for read in (untouched.tokenizer, untouched.image_processor):
            with suppress(DataError):
                read().save_pretrained(folder)


def pass_on(source: Path, folder: Path) -> None:
    """Copy those of one graph's folder to that of the graph made from it."""
    _copy(source, (*_CONFIG, *_PROCESSOR), folder)


def _save_config(untouched: Checkpoint, folder: Path) -> None:
    for name in ("config", "generation_config"):
        found = getattr(untouched.module, name, None)
        if found is not None:
            with quietly():
                found.save_pretrained(folder)


def _copy(source: Path, patterns: tuple[str, ...], folder: Path) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.name)
