"""Tiny models of every family, made on the spot: no network, no files beside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a test never waits for a network

import pytest
import torch
import transformers
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
    "bart": lambda: transformers.BartModel(bart_config()),
    "whisper": lambda: transformers.WhisperModel(whisper_config()),
    "t5": lambda: transformers.T5Model(t5_config()),
    "torch": two_heads,
    "wrapped": wrapped_bert,
}
FACTORIES = {"torch": "conftest:two_heads", "wrapped": "conftest:wrapped_bert"}
"""Plain modules, by the factory that a checkpoint names."""
MULTI_HEAD = {
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "deberta-v2",
    "vit",
    "gpt2",
    "bart",
    "whisper",
    "t5",
    "torch",
    "wrapped",
}
"""Families here whose query heads have a kv head each."""
SEQ2SEQ = {"bart", "whisper", "t5"}
"""Families with an encoder and a decoder."""
STOCK = {"vit", "t5", "llama", "qwen2", "qwen3", "mistral"}
"""Families whose own config can express fewer heads of the same width."""


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
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
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
