"""Export: names, dynamic axes, parity at other shapes, and graphs that are not the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from headwise.errors import ExportError
from headwise.export.graph import NAME_SCOPES, clean_up, save_graph
from headwise.export.onnx import ExportInfo, check_parity, to_onnx
from headwise.export.precision import convert_precision
from headwise.export.runners import OrtRunner
from headwise.gates.cost import graph_cost

Export = tuple[nn.Module, Path, ExportInfo]


def tokens(rows: int, length: int, side: str = "right", seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids; row i is padded by i tokens."""
    ids = np.random.default_rng(seed).integers(1, 50, (rows, length))
    mask = np.ones((rows, length), np.int64)
    for row in range(1, min(rows, length)):
        mask[row, -row:] = 0
    return {"input_ids": ids, "attention_mask": mask if side == "right" else mask[:, ::-1].copy()}


def both(batch: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(batch, (0, 1))


def unequal_bert() -> BertModel:
    """Two layers with 4 and 2 heads."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    model = BertModel(config, add_pooling_layer=False).eval()
    attention = model.encoder.layer[1].attention
    for linear in (attention.self.query, attention.self.key, attention.self.value):
        linear.weight, linear.bias = nn.Parameter(linear.weight[:32]), nn.Parameter(linear.bias[:32])
    dense = attention.output.dense
    dense.weight = nn.Parameter(dense.weight[:, :32])
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Export:
    module, sample = unequal_bert(), tokens(3, 7)
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    return module, path, to_onnx(module, sample, path, dynamic=both(sample))


def test_interface_of_a_transformers_model(bert: Export) -> None:
    _, _, info = bert
    assert info.inputs == dict.fromkeys(("input_ids", "attention_mask"), ("INT64", ("batch", "sequence")))
    assert info.outputs == {"last_hidden_state": ("FLOAT", ("batch", "sequence", 64))}
    assert (info.opset, info.nodes["Attention"]) == (23, 2)
    assert [found.shape for found in info.parity] == ["3x7", "1x7", "6x7", "3x4"]
    assert max(found.max_abs for found in info.parity) < 1e-5


def test_parity_at_other_shapes_and_when_it_breaks(bert: Export) -> None:
    module, path, _ = bert
    shapes = [(1, 1), (1, 30), (5, 2), (9, 17)]
    found = check_parity(module, path, [tokens(*shape) for shape in shapes])
    assert [item.shape for item in found] == ["1x1", "1x30", "5x2", "9x17"]
    bias = module.encoder.layer[1].output.dense.bias  # type: ignore[union-attr]
    before = bias.detach().clone()  # type: ignore[union-attr,operator]
    try:
        bias.data[0] += 0.5  # type: ignore[union-attr,operator,index]
        with pytest.raises(ExportError, match=r"output last_hidden_state of the graph is off by [\d.]+ at 2x5"):
            check_parity(module, path, [tokens(2, 5)])
    finally:
        bias.data.copy_(before)  # type: ignore[union-attr,operator]


def test_padded_positions_do_not_count(bert: Export) -> None:
    class Marked(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            out = bert[0](input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return {"last_hidden_state": out + 9 * (1 - attention_mask)[..., None]}

    check_parity(Marked(), bert[1], [tokens(3, 6)])


def test_the_file_keeps_module_paths_and_nothing_of_this_machine(bert: Export) -> None:
    _, path, _ = bert
    scopes = {item.value for node in onnx.load(str(path)).graph.node for item in node.metadata_props}
    assert any("'encoder.layer.1.attention.self.query'" in scope for scope in scopes)
    assert {item.key for node in onnx.load(str(path)).graph.node for item in node.metadata_props} == {NAME_SCOPES}
    raw = path.read_bytes()
    for trace in (b"site-packages", b'File "', b".py", str(Path.cwd()).encode(), str(Path.home()).encode() + b"/"):
        assert trace not in raw


def test_removed_heads_lower_the_count_in_the_graph(bert: Export) -> None:
    rows, length = 2, 16
    cost = graph_cost(
        bert[1], dict.fromkeys(("input_ids", "attention_mask"), (rows, length)), ["encoder.layer.1.attention"]
    )
    tokens_ = rows * length
    layers = [tokens_ * 4 * 64 * width + 2 * tokens_ * length * width for width in (64, 32)]
    assert cost.attention_macs == layers[1]
    assert cost.macs == sum(layers) + 2 * tokens_ * 2 * 64 * 96


def test_fp16_of_a_real_export_stays_close(bert: Export, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    convert_precision(bert[1], half, "fp16")
    batch = tokens(3, 9)
    with OrtRunner(bert[1]) as fp32, OrtRunner(half) as fp16:
        a, b = fp32(batch)["last_hidden_state"], fp16(batch)["last_hidden_state"]
    valid = batch["attention_mask"] != 0
    assert 0 < np.abs(a - b)[valid].max() < 2e-2


def test_llama_with_grouped_heads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    module, sample = LlamaForCausalLM(config).eval(), tokens(2, 6, "left")
    info = to_onnx(module, sample, tmp_path / "llama.onnx", dynamic=both(sample))
    assert module.config.use_cache
    assert info.outputs == {"logits": ("FLOAT", ("batch", "sequence", 50))}
    check_parity(module, tmp_path / "llama.onnx", [tokens(1, 3), tokens(4, 11, "left"), tokens(4, 11)])
    assert capfd.readouterr() == ("", "")


class Heads(nn.Module):
    """An encoder with a padding mask and two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(20, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.digit, self.parity = nn.Linear(20, 3), nn.Linear(20, 1)

    def forward(self, x: torch.Tensor, padding_mask: torch.Tensor) -> dict[str, torch.Tensor | None]:
        h = self.encoder(x, src_key_padding_mask=padding_mask).masked_fill(padding_mask[..., None], 0.0).mean(1)
        return {"digit": self.digit(h), "loss": None, "parity": self.parity(h)}


def test_a_plain_module_with_named_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Heads().eval()
    mask = np.zeros((3, 7), bool)
    mask[1, 5:] = True
    sample = {"x": np.random.default_rng(0).normal(size=(3, 7, 20)).astype(np.float32), "padding_mask": mask}
    info = to_onnx(module, sample, tmp_path / "m.onnx", dynamic={"x": (0, 1), "padding_mask": (0, 1)})
    assert list(info.outputs) == ["digit", "parity"]
    assert info.nodes["Attention"] == 1
    assert "forward" not in vars(module)
    assert torch.backends.mha.get_fastpath_enabled()
    longer = {"x": np.ones((5, 12, 20), np.float32), "padding_mask": np.zeros((5, 12), bool)}
    check_parity(module, tmp_path / "m.onnx", [longer])


class Function(nn.Module):
    """A module made of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x @ self.weight, y)


def export(function: Callable[..., Any], folder: Path, rows: int = 3, **options: Any) -> ExportInfo:
    sample = {"x": np.ones((rows, 4), np.float32), "y": np.full((rows, 4), 2, np.float32)}
    dynamic = {"x": (0,), "y": (0,)}
    return to_onnx(Function(function).eval(), sample, folder / "f.onnx", dynamic=dynamic, **options)


def test_a_tuple_gets_numbered_names(tmp_path: Path) -> None:
    info = export(lambda x, y: (x + y, None, x.sum(-1)), tmp_path, opset=21)
    assert (list(info.outputs), info.opset) == (["output_0", "output_2"], 21)


def test_an_input_that_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="the graph lost inputs: y\n  expected: exactly the inputs of the sample: x, y"
    ):
        export(lambda x, y: x, tmp_path)


def test_an_axis_that_was_fixed() -> None:
    graph = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]> g (float[3] x) => (float[3] y) { y = Abs(x) }')
    with pytest.raises(ExportError, match="axis 0 of input x was fixed at 3"):
        clean_up(graph, inputs=["x"], outputs=["y"], dynamic={"x": (0,)})


def test_a_size_that_the_forward_makes_a_constant(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="output output of the graph is off by 4 at 1x4"):
        export(lambda x, y: x + y * int(x.shape[0]), tmp_path)


def test_a_forward_that_takes_one_size_only(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the module itself does not run at 1x4: RuntimeError: shape"):
        export(lambda x, y: (x + y).reshape(3, 2, 2), tmp_path)


def test_a_sample_of_one_row(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"input x has shape \(1, 4\), but axis 0 is to be dynamic"):
        export(lambda x, y: x + y, tmp_path, rows=1)


def test_a_forward_that_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Function cannot be exported: ") as caught:
        export(lambda x, y: x if float(x.sum()) > 0 else y, tmp_path)
    assert "\n" not in caught.value.found


def test_an_output_of_another_shape(tmp_path: Path) -> None:
    export(lambda x, y: x + y, tmp_path)
    batch = {"x": np.ones((2, 4), np.float32), "y": np.ones((2, 4), np.float32)}
    with pytest.raises(ExportError, match=r"output output of the graph has shape \(2, 4\)\n  expected: \(2,\)"):
        check_parity(Function(lambda x, y: (x + y).sum(-1)), tmp_path / "f.onnx", [batch])


def test_not_a_number_is_no_parity(tmp_path: Path) -> None:
    export(lambda x, y: x + y, tmp_path)
    batch = {"x": np.full((2, 4), np.nan, np.float32), "y": np.ones((2, 4), np.float32)}
    with pytest.raises(ExportError, match="off by nan at 2x4"):
        check_parity(Function(lambda x, y: x + y).eval(), tmp_path / "f.onnx", [batch])


def test_a_mask_that_the_graph_ignores_is_noticed(tmp_path: Path) -> None:
    class Blind(nn.Module):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            # what tracing a sample without padding can do: the mask is read, but only its value here is kept
            weight = attention_mask * 0 + 1 if torch.compiler.is_exporting() else attention_mask
            return x * weight

    sample = {"x": np.ones((2, 4), np.float32), "attention_mask": np.ones((2, 4), np.float32)}
    with pytest.raises(ExportError, match="off by 1 at 2x4"):
        to_onnx(Blind(), sample, tmp_path / "m.onnx", dynamic={"x": (0,), "attention_mask": (0,)})


def test_a_lost_output_is_noticed() -> None:
    graph = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]> g (float[N] x) => (float[N] y) { y = Abs(x) }')
    with pytest.raises(ExportError, match="the graph lost the outputs z; it has y"):
        clean_up(graph, inputs=["x"], outputs=["y", "z"], dynamic={"x": (0,)})


def test_large_weights_go_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.export.graph._EXTERNAL_BYTES", 4)
    text = '<ir_version: 10, opset_import: ["": 23]> g (float[N, 128] x) => (float[N, 128] y) <float[128] w = {%s}> '
    text = text % ", ".join(map(str, range(128)))
    save_graph(ir.from_onnx_text(text + "{ y = Mul(x, w) }"), tmp_path / "big.onnx")
    assert (tmp_path / "big.onnx.data").stat().st_size == 512
    assert OrtRunner(tmp_path / "big.onnx")({"x": np.ones((1, 128), np.float32)})["y"].tolist() == [list(range(128))]
    cost = graph_cost(tmp_path / "big.onnx", {"x": (1, 128)})
    assert (cost.parameters, cost.file_bytes) == (128, 512 + (tmp_path / "big.onnx").stat().st_size)
