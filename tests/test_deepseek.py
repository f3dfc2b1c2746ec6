"""Latent attention saved as DeepSeek-V3: the stock class computes the same, in a process without headwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import make_inputs
from test_latent_kv import compress
from torch import nn

from headwise.cli import main
from headwise.errors import DataError, PlanError, SurgeryError, UnsupportedModelError
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.deepseek import as_deepseek
from headwise.model.saving import save_checkpoint
from headwise.model.view import ModelView
from headwise.passes.latent_kv import LatentKVPass
from headwise.pipeline.commands.plain import to_hf

EVERY: dict[str, Any] = {"rank": 7, "frequencies": "every"}
PLAIN = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(input_ids=ids).logits
made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
assert not [name for name in sys.modules if name.startswith("headwise")]
print(json.dumps({"type": model.config.model_type, "logits": logits.tolist(), "made": made.tolist()}))
"""


def saved(view: ModelView, folder: Path) -> Path:
    save_checkpoint(Checkpoint(module=view.module, source="", kind="transformers", digest=""), view, folder)
    return folder


def stock(view: ModelView) -> Any:
    config, tensors = as_deepseek(view)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def test_plain_transformers_gives_the_same_logits_and_texts(tmp_path: Path) -> None:
    view, _, _ = compress("llama", **EVERY)
    source = saved(view, tmp_path / "latent")
    found = CliRunner().invoke(main, ["to-hf", str(source), "--out", str(tmp_path / "plain")])
    assert found.exit_code == 0, found.output
    assert "is a deepseek_v3" in found.stdout
    ids = make_inputs("llama")["input_ids"]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "plain"), json.dumps(ids.tolist())]
    # From another folder: an import of headwise would have to be one of an installed package.
    plain = json.loads(subprocess.run(command, capture_output=True, check=True, text=True, cwd=tmp_path).stdout)
    assert plain["type"] == "deepseek_v3"
    model: Any = view.module
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert float((torch.tensor(plain["logits"]) - logits).abs().max() / logits.abs().max()) < 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert plain["made"] == model.generate(input_ids=ids, **options).tolist()
    assert not (tmp_path / "plain" / "headwise.json").exists()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rank": 32}),
        ("llama", {"rank": 3, "basis": "real", "fold": 3, "weighted": False}),
        ("mistral", {"rank": 7}),
    ],
)
@pytest.mark.parametrize("theta", [10_000.0, 50.0])
def test_the_norm_divides_by_a_constant(family: str, options: dict[str, Any], theta: float) -> None:
    view, _, _ = compress(family, frequencies="every", **options)
    config: Any = view.module.config
    if family == "mistral":
        config.sliding_window = None
        for layer in view.attention:
            layer.module.config.sliding_window = None  # type: ignore[union-attr]
    config.rope_parameters["rope_theta"] = theta
    for module in view.module.modules():
        if hasattr(module, "inv_freq"):
            exponents = torch.arange(0, 6, 2).float() / 6
            module.inv_freq = 1 / theta**exponents
    with torch.no_grad():
        for layer in view.attention:
            norm: Any = layer.block.get_submodule("input_layernorm")
            norm.weight *= 100
            # Biases, which the stock class only has in front of the norm.
            up = layer.module.get_submodule("v_up")
            up.register_parameter("bias", nn.Parameter(torch.randn(up.weight.shape[0])))
            rotary = layer.module.get_submodule("rotary_key")
            rotary.register_parameter("bias", nn.Parameter(torch.randn(rotary.weight.shape[0])))
        # Inputs of very different lengths.
        for token in (5, 6):
            config_weights: Any = view.module.get_submodule("model.embed_tokens")
            config_weights.weight[token] *= 1e4
        ids = torch.tensor([[5, 9, 11, 6, 4, 30, 31, 7]])
        wanted = view.module(input_ids=ids).logits
        found = stock(view)(input_ids=ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_in_bfloat16_it_is_as_close_as_the_module_of_headwise() -> None:
    view, _, _ = compress("llama", **EVERY)
    ids = make_inputs("llama")["input_ids"]
    with torch.no_grad():
        exact = view.module(input_ids=ids).logits
        found = stock(view).bfloat16()(input_ids=ids).logits.float()
        own = view.module.bfloat16()(input_ids=ids).logits.float()
    assert float((found - exact).abs().mean()) < 1.5 * float((own - exact).abs().mean())


def test_every_frequency_is_kept_equally_often() -> None:
    for route, rotary, count in (("merge", 6, 1), ("merge", 12, 2), ("heads", 12, 1)):
        view, _, _ = compress("llama", rank=7, route=route, rotary=rotary, frequencies="every")
        for layer in view.attention:
            kept = layer.module.get_buffer("frequencies")
            assert torch.equal(torch.stack([row.bincount() for row in kept]), torch.full((len(kept), 3), count))
    with pytest.raises(PlanError, match="a multiple of 6 up to 12"):
        compress("llama", rank=7, rotary=4, frequencies="every")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "text"),
    [
        ("llama", {"rank": 7, "rotary": 4}, "not turned by every frequency once"),
        ("llama", {"rank": (7, 8, 7), "frequencies": "every"}, "layers differ in heads or widths"),
        ("llama", {"rank": 7, "route": "heads", "rotary": 12}, "not every head shares one rotary key"),
        ("mistral", EVERY, "layer 0 .mistral. sees a window"),
        ("qwen2", EVERY, "layer 0 .qwen2. has biases of queries"),
        ("phi3", EVERY, "layer 0 .phi3. has another kind of block"),
        ("gpt2", {"rank": 7}, "not every head shares one rotary key"),
    ],
)
def test_what_the_class_has_no_place_for_is_refused(family: str, options: dict[str, Any], text: str) -> None:
    view, _, _ = compress(family, **options)
    with pytest.raises(UnsupportedModelError, match=text):
        as_deepseek(view)


def test_other_models_are_refused(tmp_path: Path) -> None:
    view, teacher, _ = compress("llama", **EVERY)
    with pytest.raises(UnsupportedModelError, match="not every layer has latent attention"):
        as_deepseek(teacher)
    with pytest.raises(DataError, match="loads with plain transformers as it is"):
        to_hf(saved(teacher, tmp_path / "stock"), tmp_path / "out")
    block: Any = view.attention[1].block
    block.mlp.up_proj.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 \(llama\) has biases in its MLP"):
        as_deepseek(view)
    block.mlp.up_proj.bias = None
    config: Any = view.module.config
    config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(UnsupportedModelError, match="of the type dynamic"):
        as_deepseek(view)


def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, _, _ = compress("llama", **EVERY)
    source = saved(view, tmp_path / "latent")
    # Without its size the constant is no constant behind the norm.
    monkeypatch.setattr("headwise.model.deepseek._LARGER", 1.0)
    with pytest.raises(SurgeryError, match="as DeepSeek-V3 the logits differ by"):
        to_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert load_checkpoint(source).model_type == "llama"
    assert LatentKVPass(rank=3).frequencies == "best"
