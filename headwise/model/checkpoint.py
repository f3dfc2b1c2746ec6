"""Load checkpoints, also those whose layers differ in their heads or neurons; ``saving.py`` writes them.

A saved directory holds ``model.safetensors`` and ``headwise.json`` (the layout by original ids, and how to build
the module). A transformers model also keeps its own files; where all layers are equal and the stock config can say so,
plain ``AutoModel.from_pretrained`` loads the directory as well.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from headwise.artifacts import digest_bytes, digest_file, digest_json
from headwise.errors import CheckpointError, DataError
from headwise.model import surgery
from headwise.model.finding import longest_sequence
from headwise.model.forward import input_names
from headwise.model.layout import Layout
from headwise.model.sources import (
    call_factory,
    fresh_class,
    from_pretrained,
    quietly,
    refuse_broken_weights,
)
from headwise.model.view import ModelView

_NO_FILES = "a plain module has none of its own"
SIDECAR = "headwise.json"
WEIGHTS = "model.safetensors"


@dataclass(kw_only=True)
class Checkpoint:
    """A model with what is needed to feed it and to save it again.

    Attributes:
        module: the model in eval mode and float32.
        source: what the user named: a directory, a hub id or ``module:factory``.
        kind: ``transformers``, or ``module`` for plain PyTorch.
        digest: digest of the weights and of the files that decide how they are used.
        folder: the directory that it was loaded from; None for a factory or a hub id.
        factory: ``module:factory`` of a plain module.
        layout: heads and neurons by original id, where the checkpoint came with a layout of its own.
        processor: directory or hub id of tokenizer and image processor; None where they belong to the checkpoint.
    """

    module: nn.Module
    source: str
    kind: str
    digest: str
    folder: Path | None = None
    factory: str | None = None
    layout: Layout | None = None
    processor: str | None = None

    @property
    def model_type(self) -> str:
        """``config.model_type`` of a transformers model, the class name of a plain module."""
        config = getattr(self.module, "config", None)
        return str(getattr(config, "model_type", type(self.module).__name__))

    def view(self) -> ModelView:
        """The model as attention layers and MLPs, with heads and neurons by their original ids."""
        view = ModelView.of(self.module)
        if self.layout is not None:
            view.rename(self.layout)
        return view

    def copy(self) -> Checkpoint:
        """A second, independent copy of the model."""
        return Checkpoint(**{**vars(self), "module": copy.deepcopy(self.module)})

    def longest_sequence(self) -> int | None:
        """How many tokens the model can take; None where it sets no limit."""
        return longest_sequence(self.module)

    def input_names(self) -> tuple[str, ...]:
        """The named parameters of the model's ``forward``."""
        return input_names(self.module)

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            DataError: it has none, so that text cannot be fed to it.
        """
        found, reason = (None, _NO_FILES) if self.home is None else read_tokenizer(self.home)
        if found is None:
            raise self._without("tokenizer", "text", reason)
        return found

    def image_processor(self) -> Any:
        """The checkpoint's image processor; DataError where it has none."""
        found, reason = (None, _NO_FILES) if self.home is None else _read(transformers.AutoImageProcessor, self.home)
        if found is None:
            raise self._without("image processor", "images", reason)
        return found

    @property
    def home(self) -> str | None:
        """Directory or hub id of tokenizer and image processor; None where a plain module has none."""
        home = self.processor or self.folder or (self.source if self.kind == "transformers" else None)
        return None if home is None else str(home)

    def _without(self, what: str, data: str, reason: str) -> DataError:
        return DataError(
            f"no {what} in {self.source}: {reason}",
            expected=f"a {what}, because the recipe's data are {data}",
            fix="name its directory in task.processor, or give arrays named after the model's inputs",
        )


def read_tokenizer(home: str) -> tuple[Any, str]:
    """The tokenizer of a directory or hub id, or None and the reason."""
    found, reason = _read(transformers.AutoTokenizer, home)
    # Where the directory has no tokenizer files, transformers makes up one without words: all texts are the same.
    if found is not None and len(found) <= len(set(found.all_special_ids)):
        return None, "its vocabulary is empty or missing"
    return found, reason


def _read(auto: Any, home: str) -> tuple[Any, str]:
    try:
        return auto.from_pretrained(home), ""
    except (OSError, ValueError, KeyError, ImportError) as error:
        return None, str(error).splitlines()[0]


def load_checkpoint(ref: str | Path) -> Checkpoint:
    """Load a trained model.

    Args:
        ref: a local directory (of transformers, or written by headwise), ``module:factory`` for a plain module whose
            factory takes no arguments and returns it with its weights, or a hub id.

    Raises:
        CheckpointError: nothing usable is there, or a weight is NaN or infinite.
    """
    with quietly():
        found = _find(str(ref))
    found.module.eval().requires_grad_(False)
    refuse_broken_weights(found.module, found.source)
    return found


def _find(source: str) -> Checkpoint:
    folder = Path(source)
    if folder.is_dir():
        return _load_folder(folder, source)
    if ":" in source:
        return _load_factory(source)
    if folder.exists():
        raise CheckpointError(
            f"{source} is a file",
            expected="a checkpoint directory, a hub id, or module:factory",
            fix="name the directory that holds config.json or headwise.json",
        )
    module = from_pretrained(source)
    return Checkpoint(module=module, source=source, kind="transformers", digest=_digest_module(module))


def _load_folder(folder: Path, source: str) -> Checkpoint:
    sidecar = _read_json(folder / SIDECAR) if (folder / SIDECAR).exists() else None
    if sidecar is None:
        if not (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder} has neither config.json nor {SIDECAR}",
                expected="a transformers checkpoint, or a directory written by headwise",
                fix="name the directory that save_pretrained wrote, or use module:factory for a plain module",
            )
        return Checkpoint(
            module=from_pretrained(source),
            source=source,
            kind="transformers",
            digest=_digest_folder(folder),
            folder=folder,
        )
    layout = Layout.from_json(sidecar["layout"])
    factory = sidecar.get("factory")
    if sidecar["kind"] == "transformers":
        module = from_pretrained(source) if sidecar["stock"] else _rebuild(folder, layout, sidecar.get("arguments", {}))
    else:
        module = call_factory(factory)
        _load_weights(module, layout, folder)
    return Checkpoint(
        module=module,
        source=source,
        kind=sidecar["kind"],
        digest=_digest_folder(folder),
        folder=folder,
        factory=factory,
        layout=layout,
    )


def _rebuild(folder: Path, layout: Layout, arguments: dict[str, bool]) -> nn.Module:
    """A transformers model whose layers have other shapes than its config says."""
    values = _read_json(folder / "config.json")
    config = transformers.AutoConfig.for_model(**values)
    module: nn.Module = fresh_class(config)(config, **arguments)
    _load_weights(module, layout, folder)
    tie: Any = module.tie_weights
    tie()
    return module


def _load_weights(module: nn.Module, layout: Layout, folder: Path) -> None:
    surgery.reshape(ModelView.of(module), layout)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(str(path)))
    have = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = {n for n in have if n not in dict(module.named_parameters())}
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    lost = [name for name in missing if name not in tied and name not in _tied_names(module)]
    if lost or unexpected:
        raise CheckpointError(
            f"{folder}: weights do not fit the model (missing {lost[:3]}, unexpected {list(unexpected)[:3]})",
            expected="exactly the weights that the model has",
            fix="save the checkpoint again with headwise, or load it with the version that wrote it",
        )


def _tied_names(module: nn.Module) -> set[str]:
    """Parameters that transformers ties to another one and leaves out of the file."""
    return set(getattr(module, "all_tied_weights_keys", None) or {})


def _load_factory(source: str) -> Checkpoint:
    module = call_factory(source)
    return Checkpoint(module=module, source=source, kind="module", digest=_digest_module(module), factory=source)


def _digest_folder(folder: Path) -> str:
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.suffix in {".safetensors", ".bin", ".json", ".txt"}
    )
    return digest_json({p.relative_to(folder).as_posix(): digest_file(p) for p in files})


def _digest_module(module: nn.Module) -> str:
    parts = {n: digest_bytes(t.detach().cpu().contiguous().numpy().tobytes()) for n, t in module.state_dict().items()}
    return digest_json([type(module).__name__, parts])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        assert isinstance(values, dict)
    except (ValueError, OSError, AssertionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", expected="a JSON object", fix="save the checkpoint again"
        ) from error
    return values
