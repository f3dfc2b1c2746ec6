"""Write a result as a checkpoint that transformers loads without headwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from headwise.artifacts import building
from headwise.errors import DataError, SurgeryError
from headwise.model.checkpoint import SIDECAR, load_checkpoint
from headwise.model.deepseek import as_deepseek
from headwise.model.saving import copy_companions
from headwise.model.sources import quietly
from headwise.pipeline.commands.convert import REPORT
from headwise.pipeline.folders import compressed_model, is_run
from headwise.pipeline.report.document import read_report
from headwise.tolerances import TWIN

_ROWS, _TOKENS = 2, 32


def to_hf(artifact: str | Path, out: str | Path) -> dict[str, Any]:
    """Write a decoder with latent attention as a dense DeepSeek-V3, after both have given the same logits.

    Args:
        artifact: the folder of a run or of a conversion, or a checkpoint that headwise wrote.
        out: folder for the checkpoint.

    Returns:
        The model type, and the largest difference of logits relative to the largest one.

    Raises:
        DataError: it loads with plain transformers as it is.
        UnsupportedModelError: no class of transformers computes what it computes.
        SurgeryError: the logits differ.
    """
    folder = Path(artifact)
    if is_run(folder):
        folder = Path(compressed_model(folder, read_report(folder)))
    checkpoint = load_checkpoint(folder)
    sidecar = json.loads((folder / SIDECAR).read_text()) if (folder / SIDECAR).exists() else {"stock": True}
    if sidecar.get("stock"):
        raise DataError(
            f"{folder} loads with plain transformers as it is",
            expected="a model that only headwise loads, such as a result of latent-kv",
            fix="give this folder to AutoModelForCausalLM.from_pretrained",
        )
    config, tensors = as_deepseek(checkpoint.view())
    with torch.device("meta"):
        module: Any = transformers.DeepseekV3ForCausalLM(config)
    difference = _difference(checkpoint.module, config, tensors)
    with building(Path(out)) as temporary:
        with quietly():
            module.save_pretrained(str(temporary), state_dict=tensors)
        copy_companions(folder, temporary, leave={SIDECAR, REPORT})
    return {"model_type": config.model_type, "difference": difference, "folder": str(out)}


def _difference(module: Any, config: Any, tensors: dict[str, torch.Tensor]) -> float:
    """The largest difference of the logits of random tokens, relative to the largest one.

    Raises:
        SurgeryError: it is larger than that of an exact edit.
    """
    with quietly():
        stock = transformers.DeepseekV3ForCausalLM.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=torch.float32
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (_ROWS, _TOKENS), generator=generator)
    with torch.inference_mode():
        found, wanted = (model.eval()(input_ids=tokens).logits for model in (stock, module))
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    if not difference <= TWIN:
        raise SurgeryError(
            f"as DeepSeek-V3 the logits differ by {difference:.2g} of the largest one",
            expected=f"at most {TWIN:g}",
            fix="this is a bug in headwise; please report it with the model type and the recipe",
        )
    return difference
