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

from headwise.model.families import FAMILIES

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
_SEQ2SEQ = {
    "d_model": WIDTH,
    # Three attention layers: of the encoder, of the decoder, and of the decoder to the encoder.
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def bart_config(**options: Any) -> transformers.BartConfig:
    """BART with three attention layers unless ``options`` say otherwise."""
    return transformers.BartConfig(
        **{**_SEQ2SEQ, "max_position_embeddings": 40, "forced_eos_token_id": None, **options}
    )


def whisper_config(**options: Any) -> transformers.WhisperConfig:
    """Whisper with three attention layers and spectrograms of 14 frames unless ``options`` say otherwise."""
    sizes = {"max_source_positions": 7, "max_target_positions": 20, "num_mel_bins": 8}
    return transformers.WhisperConfig(**{**_SEQ2SEQ, **sizes, **options})


def t5_config(**options: Any) -> transformers.T5Config:
    """T5 with three attention layers, and heads that are narrower than width / heads, unless ``options`` say else."""
    sizes = {"d_model": WIDTH, "d_kv": 6, "d_ff": 48, "num_layers": 1, "num_heads": HEADS, "vocab_size": VOCABULARY}
    positions = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
    return transformers.T5Config(**{**sizes, **positions, "eos_token_id": 2, "decoder_start_token_id": 0, **options})


def albert_config(**options: Any) -> transformers.AlbertConfig:
    """ALBERT with as many groups of blocks as elsewhere layers, and two layers that pass through each."""
    sizes = {"num_hidden_layers": 2 * LAYERS, "num_hidden_groups": LAYERS, "embedding_size": 16}
    return transformers.AlbertConfig(**{**_TEXT, **sizes, **options})


def deberta_config(**options: Any) -> transformers.DebertaV2Config:
    """DeBERTa as it is published: both kinds of position terms, with projections of their own."""
    positions = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
    config = {**_TEXT, **positions, "position_biased_input": False, "norm_rel_ebd": "layer_norm", "pad_token_id": 0}
    return transformers.DebertaV2Config(**{**config, **options})


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
    "albert": lambda: transformers.AlbertModel(albert_config()),
    "deberta-v2": lambda: transformers.DebertaV2Model(deberta_config()),
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
    "bart": lambda: transformers.BartModel(bart_config()),
    "whisper": lambda: transformers.WhisperModel(whisper_config()),
    "t5": lambda: transformers.T5Model(t5_config()),
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
SEQ2SEQ = {"bart", "whisper", "t5"}
"""Families with an encoder and a decoder."""
STOCK = GROUPED | {"vit", "deit", "dinov2", "t5"}
"""Families whose own config can express fewer heads of the same width."""
NORMALISED = {"qwen3", "gemma3"}
"""Families that normalise queries and keys."""


def allowed(pass_: str) -> list[str]:
    """Families here whose record does not refuse a pass."""
    described = {name: FAMILIES[name].kinds for name in MODELS if name in FAMILIES}
    return [name for name in MODELS if not any(pass_ in kind.refuses for kind in described.get(name, ()))]


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A tiny model in eval mode with weights large enough for heads to matter."""
    torch.manual_seed(seed)
    return randomize(MODELS[name](), seed=None)


def randomize(model: nn.Module, seed: int | None = 0) -> nn.Module:
    """Eval mode, and weights large enough for heads to matter; without a seed they go on from the last draw."""
    if seed is not None:
        torch.manual_seed(seed)
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
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator), "attention_mask": mask}
    if name in SEQ2SEQ:
        # As many decoder tokens as encoder tokens, so that only the right mask gives the right padding.
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
        inputs["decoder_attention_mask"] = torch.tensor([[1] * 7, [1] * 6 + [0]])
    if name == "whisper":
        del inputs["input_ids"], inputs["attention_mask"]
        inputs["input_features"] = torch.randn(2, 8, 14, generator=generator)
    return inputs


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
