"""Where models come from: the stock classes of transformers, and factories of plain modules."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from headwise.errors import CheckpointError


def from_pretrained(source: str) -> nn.Module:
    """The transformers model of a directory or hub id, in float32, with a trained weight for every parameter.

    Raises:
        CheckpointError: it cannot be loaded, or some of its weights would be random.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        cls = fresh_class(config)
        module, info = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing and all(name.startswith("pooler.") for name in missing):
            # Sentence encoders are often saved without the pooler; a random one must not become an output.
            module, info = cls.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, add_pooling_layer=False
            )
            missing = sorted(info["missing_keys"])
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"{source} cannot be loaded: {str(error).strip().splitlines()[0]}",
            expected="a checkpoint directory, a hub id that transformers can load, or module:factory",
            fix="check the name; a hub id needs the network or a filled cache",
        ) from error
    if missing:
        raise CheckpointError(
            f"{source} has no weights for {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}",
            expected="a trained weight for every parameter of " + type(module).__name__,
            fix="use the checkpoint of the fine-tuned model: headwise does not measure randomly initialised heads",
        )
    assert isinstance(module, nn.Module)
    return module


def fresh_class(config: Any) -> Any:
    """The class that the checkpoint was saved from; the bare backbone where the config does not say."""
    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel


def constructor_arguments(module: nn.Module) -> dict[str, bool]:
    """Arguments beside the config that a transformers class needs to build this module again."""
    accepted = inspect.signature(type(module).__init__).parameters
    return {"add_pooling_layer": module.pooler is not None} if "add_pooling_layer" in accepted else {}


def fresh(module: nn.Module, config: Any = None) -> nn.Module:
    """The stock model of the module's config, or of another one, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return type(module)(copy.deepcopy(config or module.config), **constructor_arguments(module))


def call_factory(source: str | None) -> nn.Module:
    """The module that ``module:factory`` returns, in float32.

    Raises:
        CheckpointError: the factory cannot be imported, fails, or returns something else.
    """
    name, _, attribute = (source or "").partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be imported: {error}",
            expected="module:factory, where factory() returns an nn.Module with its weights",
            fix="run from the folder that holds the module, or install it",
        ) from error
    try:
        module = factory()
    except Exception as error:  # somebody else's code
        raise CheckpointError(
            f"{source}() failed: {type(error).__name__}: {error}",
            expected="a factory without arguments that returns an nn.Module with its weights",
            fix="call it in a Python shell to see the full traceback",
        ) from error
    if not isinstance(module, nn.Module):
        raise CheckpointError(
            f"{source}() returned {type(module).__name__}",
            expected="an nn.Module with its weights",
            fix="return the model itself from the factory",
        )
    return module.float()


def refuse_broken_weights(module: nn.Module, source: str) -> None:
    """Raise CheckpointError, naming the tensor, when a weight is NaN or infinite."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite values",
                expected="finite weights",
                fix="use a checkpoint from before the training diverged",
            )


@contextmanager
def quietly() -> Iterator[None]:
    """transformers draws a bar for every file, and reports at length on weights that are checked here anyway."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
