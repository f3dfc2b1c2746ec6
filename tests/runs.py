"""Small inputs for whole runs: a checkpoint, its data and a recipe in one folder. Made on the spot, in a second."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from conftest import HEADS, WIDTH, make_model, randomize
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from headwise.model.checkpoint import Checkpoint
from headwise.model.saving import save_checkpoint
from headwise.pipeline.run import Run, compress

SPARE = HEADS - 1
"""The head of every layer that hardly matters, so that a quarter of the heads can go without harm."""
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrst"]


def plain_files(folder: Path) -> Path:
    """A plain module with two outputs, npz data with its own answers (one in ten wrong) as labels, and a recipe."""
    folder.mkdir(parents=True)
    module: Any = make_model("torch")
    with torch.no_grad():
        for layer in module.encoder.layers:
            layer.self_attn.out_proj.weight[:, SPARE * WIDTH // HEADS :] *= 1e-3
    source = "conftest:two_heads"
    checkpoint = Checkpoint(module=module, source=source, kind="module", digest="", factory=source)
    save_checkpoint(checkpoint, checkpoint.view(), folder / "checkpoint")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("test", 60), ("calibration", 48)):
        tokens = torch.randn(count, 5, WIDTH, generator=generator)
        with torch.no_grad():
            labels = {output: scores.argmax(1) for output, scores in module(tokens).items()}
        labels = {output: torch.where(torch.arange(count) % 10 == 0, 0, found) for output, found in labels.items()}
        np.savez(folder / f"{name}.npz", tokens=tokens, **labels)  # type: ignore[arg-type]
    write_recipe(folder, PLAIN)
    return folder


PLAIN: dict[str, Any] = {
    "task": {
        "type": "multi-output",
        "data": {"path": "test.npz"},
        "outputs": {
            "digit": {"type": "classification", "metric": "accuracy"},
            "parity": {"type": "classification", "metric": "f1"},
        },
    },
    "calibration": {"data": {"path": "calibration.npz"}, "samples": 40},
    "passes": [{"prune-heads": {"ratio": 0.25}}],
    "gate": {"max_drop": 2.0},
}


def text_files(folder: Path, *, vocabulary: int = len(WORDS)) -> Path:
    """A tiny BERT with a tokenizer, sentence pairs with its own cosine as score, and a recipe."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=24,
    )
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for layer in module.encoder.layer:
            layer.attention.output.dense.weight[:, SPARE * WIDTH // HEADS :] *= 1e-3
    module.save_pretrained(folder / "checkpoint")
    make_tokenizer().save_pretrained(folder / "checkpoint")
    random = np.random.default_rng(0)
    for name, count in (("test", 60), ("calibration", 40)):
        lines = ["first\tsecond\tscore"]
        for _ in range(count):
            first = random.choice(WORDS[4:], size=random.integers(2, 9))
            second = np.where(random.random(len(first)) < 0.5, first, random.choice(WORDS[4:], size=len(first)))
            lines.append(f"{' '.join(first)}\t{' '.join(second)}\t{5 * np.mean(first == second):.2f}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    write_recipe(folder, TEXT)
    return folder


TEXT: dict[str, Any] = {
    "task": {"type": "sentence-similarity", "metric": "spearman", "data": {"path": "test.tsv"}},
    "calibration": {"data": {"path": "calibration.tsv"}, "samples": 32},
    "passes": [{"prune-heads": {"ratio": 0.25}}],
    "gate": {"max_drop": 2.0},
    "export": {"sequence": {"min": 1, "opt": 8, "max": 16}},
}


def story_files(folder: Path) -> Path:
    """A tiny Llama with a tokenizer, texts, and a recipe that quantizes it for the CPU."""
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=48,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    module: Any = randomize(transformers.LlamaForCausalLM(config))
    for layer in module.model.layers:
        layer.self_attn.o_proj.weight[:, SPARE * WIDTH // HEADS :] *= 1e-3
    module.save_pretrained(folder / "checkpoint")
    make_tokenizer("[CLS] $A").save_pretrained(folder / "checkpoint")
    random = np.random.default_rng(0)
    for name, count in (("test", 40), ("calibration", 40)):
        texts = [" ".join(random.choice(WORDS[4:], size=random.integers(4, 12))) for _ in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["text", *texts]) + "\n")
    write_recipe(folder, STORY)
    return folder


STORY: dict[str, Any] = {
    "task": {"type": "language-modeling", "data": {"path": "test.csv"}},
    "calibration": {"data": {"path": "calibration.csv"}, "samples": 32},
    "passes": [{"prune-heads": {"ratio": 0.25}}, {"quantize": {"format": "int8", "kv": "int8"}}],
    "gate": {"max_drop": 0.5},
    "targets": ["cpu"],
}


def make_tokenizer(single: str = "[CLS] $A [SEP]") -> transformers.PreTrainedTokenizerFast:
    """Knows ``WORDS``."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(folder: Path, *overrides: str, **options: Any) -> Run:
    """The folder's recipe on its checkpoint, into ``out``."""
    return compress(folder / "checkpoint", folder / "recipe.yaml", folder / "out", overrides=overrides, **options)


_FINISHED: dict[str, tuple[Path, Run]] = {}


def finished(kind: str, base: Path) -> tuple[Path, Run]:
    """A finished run, made once for all test modules. Tests read it; those that change it take a copy."""
    if kind not in _FINISHED:
        folder = {"plain": plain_files, "text": text_files, "story": story_files}[kind](base / kind)
        _FINISHED[kind] = folder, run(folder)
    return _FINISHED[kind]


def copied(kind: str, base: Path, to: Path) -> Path:
    """A copy of that run and its inputs."""
    return Path(shutil.copytree(finished(kind, base)[0], to / "copy"))


def begun(kind: str, base: Path, to: Path) -> Path:
    """A copy of the inputs, with the baseline only: other recipes find the one thing made that all have in common."""
    folder = copied(kind, base, to)
    for path in (folder / "out").iterdir():
        if path.is_dir() and not path.name.startswith("00-baseline"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    return folder
