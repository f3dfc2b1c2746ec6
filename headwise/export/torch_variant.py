"""A checkpoint in PyTorch, as something that is timed."""

from __future__ import annotations

from typing import Any

import torch

from headwise.device.arrays import Port
from headwise.errors import DataError, MachineError
from headwise.export.ports import IDS, MASK, POSITIONS
from headwise.export.random_inputs import Case, random_inputs
from headwise.export.variants import Inputs
from headwise.model.cache import is_past, past_axis
from headwise.model.checkpoint import load_checkpoint
from headwise.model.decoder import make_cache, why_no_cache
from headwise.model.forward import run


class TorchVariant:
    """A checkpoint, with its cache where it is a decoder that can keep one."""

    runtime = "torch"

    def __init__(self, source: str, *, threads: int, provider: str) -> None:
        if provider == "tensorrt":
            raise MachineError(
                f"{source} is a checkpoint, which PyTorch runs, not TensorRT",
                expected="provider cpu or cuda",
                fix="name the graph of a run instead of the checkpoint",
            )
        if provider == "cuda" and not torch.cuda.is_available():
            raise MachineError("torch finds no GPU", expected="provider cpu", fix="use --provider cpu")
        torch.set_num_threads(threads)
        checkpoint = load_checkpoint(source)
        self._module = checkpoint.module.to(provider)
        self._view = checkpoint.view()
        self.version, self.device = str(torch.__version__), provider
        self.cached = not why_no_cache(self._view)
        self.longest = checkpoint.longest_sequence()
        self._names = checkpoint.input_names()
        self.inputs: Inputs
        self.inputs, self.vocabulary = _stock_inputs(self._module, self._names)
        self.bytes = sum(p.numel() * p.element_size() for p in self._module.parameters())
        self._batch: dict[str, torch.Tensor] = {}
        self._past: dict[str, torch.Tensor] | None = None
        self._more: dict[str, Any] = {}

    def prepare(self, case: Case, others: Inputs) -> dict[str, tuple[int, ...]]:
        """See ``Variant``."""
        inputs = dict(self.inputs or {name: entry for name, entry in others.items() if name in self._names})
        if not inputs:
            raise DataError(
                f"{type(self._module).__name__} does not say what its inputs look like",
                expected="a graph among the things to compare, whose inputs say it, or a stock model of transformers",
                fix="name the run that was made from this checkpoint as well",
            )
        layout = self._view.layout.cache
        self._past = None
        if case.past is not None:
            inputs |= {
                name: Port("float32", tensor.dims("batch", past_axis(tensor))) for name, tensor in layout.past().items()
            }
            inputs[POSITIONS] = Port("int64", ("batch", "sequence"))
        arrays = random_inputs(inputs, case)
        tensors = {name: torch.as_tensor(array, device=self.device) for name, array in arrays.items()}
        self._batch = {name: tensor for name, tensor in tensors.items() if not is_past(name)}
        if case.past is not None:
            self._past = {name: tensor for name, tensor in tensors.items() if is_past(name)}
        return {name: array.shape for name, array in arrays.items()}

    def reset(self) -> None:
        """See ``Variant``; a call adds to the cache that it is given."""
        if self._past is not None:
            self._more = {"past_key_values": make_cache(self._view.layout.cache, self._past), "use_cache": True}

    def call(self) -> None:
        """See ``Variant``."""
        with torch.no_grad():
            outputs = run(self._module, {**self._batch, **self._more})
        for tensor in outputs.values():
            tensor.cpu()


def _stock_inputs(module: Any, names: tuple[str, ...]) -> tuple[dict[str, Port], int | None]:
    """Inputs and vocabulary of a model of transformers that reads text or images of one size; empty for others."""
    config = getattr(module, "config", None)
    found: dict[str, Port] = {}
    vocabulary = None
    if config is None or getattr(config, "is_encoder_decoder", False):
        return found, vocabulary
    text, image = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    if IDS in names:
        vocabulary = int(text.vocab_size)
        found |= {n: Port("int64", ("batch", "sequence")) for n in (IDS, MASK) if n in names}
    if "pixel_values" in names:
        size = image.image_size
        height, width = (size, size) if isinstance(size, int) else size
        found["pixel_values"] = Port("float32", ("batch", image.num_channels, height, width))
    return found, vocabulary
