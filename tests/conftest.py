"""Tiny models of every family, made on the spot: no network, no files beside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a test never waits for a network

import pytest
import torch
import transformers
from timm_like import timm_vit
from torch import nn

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

WIDTH, LAYERS, HEADS, KV_HEADS, VOCABULARY = 32, 3, 4, 2, 50

_ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
}
_TEXT = {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 40}
_DECODER = {
    **_TEXT,
    "num_key_value_heads": KV_HEADS,
    # Not WIDTH / HEADS: nothing may derive the head width from the model width.
    "head_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_VISION = {**_ENCODER, "image_size": 8, "patch_size": 4}
_GEMMA = {**_DECODER, "query_pre_attn_scalar": 9, "sliding_window": 3}
_PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
_CLIP_TEXT = {**_TEXT, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 16}
_CLIP_VISION = {**_VISION, "projection_dim": 16}
SIZES: tuple[dict[str, Any], ...] = (_ENCODER, _TEXT, _DECODER, _VISION, _GEMMA, _CLIP_TEXT, _CLIP_VISION)
"""What the configs below are made of."""


class TwoHeads(nn.Module):
    """A plain module on nn.TransformerEncoder with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.digit = nn.Linear(WIDTH, 3)
        self.parity = nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        summary = self.encoder(tokens).mean(dim=1)
        return {"digit": self.digit(summary), "parity": self.parity(summary)}


class WrappedBert(nn.Module):
    """A transformers encoder inside a plain module with two outputs, as people write multi-task models."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = transformers.BertModel(transformers.BertConfig(**_TEXT), add_pooling_layer=False)
        self.coarse = nn.Linear(WIDTH, 3)
        self.fine = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        summary = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return {"coarse": self.coarse(summary), "fine": self.fine(summary)}


def wrapped_bert() -> nn.Module:
    """Factory for checkpoints of ``WrappedBert``."""
    return WrappedBert()


def two_heads() -> nn.Module:
    """Factory for checkpoints of ``TwoHeads``."""
    return TwoHeads()


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        n_positions=40,
    )
    return transformers.GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    size = {key: value for key, value in _TEXT.items() if key != "intermediate_size"}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**size, ffn_dim=48, word_embed_proj_dim=24))


def _dinov2() -> nn.Module:
    size = {key: value for key, value in _VISION.items() if key != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**size, mlp_ratio=2, layerscale_value=0.5))


def _clip() -> nn.Module:
    """One text layer, and image layers up to as many as the other models have in all."""
    images = {**_CLIP_VISION, "num_hidden_layers": max(1, _CLIP_VISION["num_hidden_layers"] - 1)}
    texts = {**_CLIP_TEXT, "num_hidden_layers": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=texts, vision_config=images, projection_dim=16))


def _phi3() -> nn.Module:
    config = {**_DECODER, "head_dim": 8, "rope_parameters": _PARTIAL, "pad_token_id": 0}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**config))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_TEXT)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**_TEXT)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, vocab_size=VOCABULARY, max_position_embeddings=40
        )
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**_ENCODER, image_size=8, patch_size=4)),
    "gpt2": _gpt2,
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_DECODER)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**_TEXT, embedding_size=16)),
    "clip-text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**_CLIP_TEXT)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**_VISION)),
    "dinov2": _dinov2,
    "clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_CLIP_VISION)),
    "clip": _clip,
    "opt": _opt,
    "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**_TEXT, bos_token_id=1, rope_parameters=_PARTIAL)
    ),
    "phi3": _phi3,
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_GEMMA, attn_logit_softcapping=5.0)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_GEMMA)),
    "timm": timm_vit,
    "torch": two_heads,
    "wrapped": wrapped_bert,
}
FACTORIES = {"timm": "timm_like:timm_vit", "torch": "conftest:two_heads", "wrapped": "conftest:wrapped_bert"}
"""Plain modules, by the factory that a checkpoint names."""
IMAGES = {"vit", "deit", "dinov2", "clip-vision", "clip"}
"""Families that take images."""
GROUPED = {"llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3"}
"""Families here whose query heads share kv heads; those of the others have one each."""
MULTI_HEAD = MODELS.keys() - GROUPED
DECODERS = GROUPED | {"gpt2", "opt", "gpt-neox"}
"""Families that predict the next token."""
STOCK = GROUPED | {"vit", "deit", "dinov2"}
"""Families whose own config can express fewer heads of the same width."""
NORMALISED = {"qwen3", "gemma3"}
"""Families that normalise queries and keys."""


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A tiny model in eval mode with weights large enough for heads to matter."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def make_inputs(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows; where there is a mask, the second row is padded."""
    generator = torch.Generator().manual_seed(seed)
    images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)} if name in IMAGES else {}
    if name == "clip":
        # As many tokens as the image has patches, so that the mask of the texts would fit the images.
        mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
        return {
            "input_ids": torch.randint(3, VOCABULARY, (2, 5), generator=generator),
            **images,
            "attention_mask": mask,
        }
    if name == "timm":
        return {"x": torch.randn(2, 3, 8, 8, generator=generator)}
    if images:
        return images
    if name == "torch":
        return {"tokens": torch.randn(2, 5, WIDTH, generator=generator)}
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator), "attention_mask": mask}


def largest_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Over all outputs; the two must have the same ones."""
    assert left.keys() == right.keys()
    assert left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(params=list(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    """The name of every family in turn."""
    name: Any = request.param
    return str(name)
