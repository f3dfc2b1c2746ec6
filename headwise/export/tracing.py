"""What has to be different about a module, and about other libraries, while it is traced; all of it is undone."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

import torch

from headwise.model.forward import named_outputs

_NOISY = ("torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def tuple_outputs(module: torch.nn.Module) -> Iterator[None]:
    """Let ``forward`` return just its named tensors; None, caches and loss are no graph outputs."""
    original = module.forward
    own = "forward" in vars(module)

    def forward(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(named_outputs(original(**inputs)).values())

    forward.__wrapped__ = original  # type: ignore[attr-defined]  # torch.export reads the signature
    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = original
        else:
            del module.forward


@contextlib.contextmanager
def caching(module: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Whether a forward returns a cache; one that nobody asked for would only be cut off again."""
    config = getattr(module, "config", None)
    previous = getattr(config, "use_cache", wanted)
    if previous != wanted:
        config.use_cache = wanted  # type: ignore[union-attr]
    try:
        yield
    finally:
        if previous != wanted:
            config.use_cache = previous  # type: ignore[union-attr]


@contextlib.contextmanager
def grouped_heads() -> Iterator[None]:
    """With a mask, transformers repeats kv heads in memory for torch's kernels; the operator ``Attention`` need not."""
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    previous = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


@contextlib.contextmanager
def no_fastpath() -> Iterator[None]:
    """``nn.TransformerEncoderLayer`` in eval mode calls one opaque kernel that has no ONNX form."""
    previous = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(previous)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters print progress and warn about version drift and about packages that no model here needs."""
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(_NOISY)]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
