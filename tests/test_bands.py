"""Encoders whose heads see a band and global tokens: chunks equal masks, cost less, and run in graphs and engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import HEADS, LAYERS, make_model
from test_passes import samples
from transformers import BertConfig, BertModel

from headwise.calibration.stats import Stat, collect
from headwise.calibration.streaming import GateTraining, Span
from headwise.errors import PlanError
from headwise.export.onnx import check_parity, to_onnx
from headwise.export.precision import ExportSpec, convert_precision
from headwise.export.profiles import profiles_for
from headwise.export.targets import resolve_target
from headwise.export.tensorrt import build_engine
from headwise.gates.cost import graph_cost
from headwise.model import surgery
from headwise.model.bands import Band, cut, visible_in_band
from headwise.model.checkpoint import Checkpoint, load_checkpoint
from headwise.model.edits import EditPlan, KeepTokens, StreamHeads
from headwise.model.forward import run
from headwise.model.layout import Layout
from headwise.model.limits import limits
from headwise.model.saving import save_checkpoint
from headwise.model.token_budget import TokenBudget
from headwise.model.view import ModelView
from headwise.passes.base import make_plan, run_pass
from headwise.passes.stream_heads import StreamHeadsPass
from headwise.tolerances import TWIN

TEXTS = ["bert", "roberta", "distilbert", "electra"]
IMAGES = ["vit", "deit", "dinov2", "clip-vision"]
TOKENS = 23


def plan_of(view: ModelView, windows: tuple[int, ...], sink: int) -> EditPlan:
    """One head sees all in the first layer, none in the second one, all but one in the last."""
    kv = view.layout.attention[0].kv
    first = {head: windows[head % len(windows)] for head in kv[1:]}
    chosen = (first, dict.fromkeys(kv, windows[0]), {kv[0]: windows[-1]})
    return EditPlan(
        edits=tuple(StreamHeads(layer=i, windows=w, sink=sink, bidirectional=True) for i, w in enumerate(chosen))
    )


def padded(*lengths: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (len(lengths), tokens), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def images(family: str) -> dict[str, torch.Tensor]:
    size = make_model(family).config.image_size  # type: ignore[union-attr]
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))}


def states(view: ModelView, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Final hidden states of the tokens that are no padding."""
    with torch.no_grad():
        found = run(view.module, dict(inputs))["last_hidden_state"]
    return found[inputs["attention_mask"].bool()] if "attention_mask" in inputs else found


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("lengths", [(TOKENS, 9, 2), (TOKENS,) * 2])
@pytest.mark.parametrize("family", TEXTS)
def test_the_edited_model_is_its_masked_twin(family: str, lengths: tuple[int, ...], sink: int) -> None:
    view, inputs = ModelView.of(make_model(family)), padded(*lengths)
    plan, untouched = plan_of(view, (3, 2), sink), states(view, inputs)
    with surgery.twin(view, plan):
        expected = states(view, inputs)
    assert torch.equal(untouched, states(view, inputs))
    surgery.apply(view, plan)
    found = states(view, inputs)
    assert largest(found, expected) < TWIN
    assert largest(found, untouched) > 100 * TWIN
    # A text gives what it gives without padding, and without other texts.
    alone = {name: tensor[-1:, : lengths[-1]] for name, tensor in inputs.items()}
    assert largest(found[-lengths[-1] :], states(view, alone)) < TWIN


@pytest.mark.parametrize("family", IMAGES)
def test_patches_have_bands(family: str) -> None:
    view, inputs = ModelView.of(make_model(family)), images(family)
    plan, untouched = plan_of(view, (1,), 1), states(view, inputs)
    with surgery.twin(view, plan):
        expected = states(view, inputs)
    surgery.apply(view, plan)
    assert largest(states(view, inputs), expected) < TWIN < largest(states(view, inputs), untouched)


@pytest.mark.parametrize(("window", "sink"), [(TOKENS, 0), (1, TOKENS), (TOKENS - 3, 3)])
def test_bands_that_cover_the_text_change_nothing(window: int, sink: int) -> None:
    view, inputs = ModelView.of(make_model("bert")), padded(TOKENS, 9)
    untouched = states(view, inputs)
    surgery.apply(view, plan_of(view, (window,), sink))
    assert largest(states(view, inputs), untouched) < TWIN


@pytest.mark.parametrize("total", [1, 4, 5, 11, 12])
@pytest.mark.parametrize("band", [Band(0, 1), Band(2, 3), Band(5, 4), Band(12, 2), Band(1, 20)])
def test_chunks_see_every_visible_key_once_and_no_query_sees_nothing(total: int, band: Band) -> None:
    seen = torch.arange(total) < torch.tensor([[total], [total // 2], [0]])
    for mask in (seen, None):
        chunks = cut(mask, band, total)
        found = torch.zeros(len(chunks.visible), total, total, dtype=torch.int64)
        rows = chunks.visible.flatten(1, 2)
        keys = chunks.keys.unflatten(0, (-1, band.sink + 3 * band.window)).repeat_interleave(band.window, 0)
        found.scatter_add_(2, keys[:total].expand(len(rows), -1, -1), rows[:, :total].long())
        expected = visible_in_band(mask, band, total)[:, 0].long()
        assert bool(rows.any(-1).all() and expected.any(-1).all())
        # Global tokens look at all from a product of their own.
        assert torch.equal(found[:, band.sink :], expected[:, band.sink :])


def test_global_tokens_see_all_and_are_seen() -> None:
    seen = visible_in_band(None, Band(1, 2), 6)[0, 0].long()
    assert seen.tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 0, 0, 0, 1, 1],
    ]


def test_a_saved_encoder_has_its_bands_when_it_is_loaded(tmp_path: Path) -> None:
    view, inputs = ModelView.of(make_model("bert")), padded(TOKENS, 9)
    plan = plan_of(view, (3, 2), 1)
    assert EditPlan.from_json(plan.to_json()) == plan
    surgery.apply(view, plan)
    save_checkpoint(Checkpoint(module=view.module, source="x", kind="transformers", digest=""), view, tmp_path)
    again = load_checkpoint(tmp_path).view()
    assert again.layout == view.layout == Layout.from_json(view.layout.to_json())
    assert again.layout.attention[0].bidirectional
    assert torch.equal(states(again, inputs), states(view, inputs))


# ----------------------------------------------------------------------------------------------------------- the graph


def banded_bert() -> ModelView:
    """Half of the heads of one layer have bands of 16 tokens on either side, and two global tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=50, max_position_embeddings=512)
    view = ModelView.of(BertModel(config, add_pooling_layer=False).eval())
    edit = StreamHeads(layer=0, windows={0: 16, 2: 16}, sink=2, bidirectional=True)
    surgery.apply(view, EditPlan(edits=(edit,)))
    return view


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelView, Path]:
    view, path = banded_bert(), tmp_path_factory.mktemp("bands") / "model.onnx"
    sample = {name: tensor.numpy() for name, tensor in padded(70, 41, tokens=70).items()}
    info = to_onnx(view.module, sample, path, dynamic=dict.fromkeys(sample, (0, 1)))
    # Of the heads that see all, of chunks and of global tokens.
    assert info.nodes["Attention"] == 3
    return view, path


def test_one_graph_takes_every_length(exported: tuple[ModelView, Path]) -> None:
    view, path = exported
    lengths = (1, 2, 15, 16, 17, 48, 51, 160)
    texts = [padded(size, max(1, size // 3), 1, tokens=size) for size in lengths]
    batches = [{name: tensor.numpy() for name, tensor in text.items()} for text in texts]
    assert len(check_parity(view.module, path, batches)) == len(lengths)


def test_work_grows_with_the_length_and_not_with_its_square(exported: tuple[ModelView, Path], tmp_path: Path) -> None:
    view, dynamic = exported
    fixed = tmp_path / "fixed.onnx"
    sample = {name: tensor.numpy() for name, tensor in padded(512, 300, tokens=512).items()}
    to_onnx(view.module, sample, fixed, dynamic=dict.fromkeys(sample, (0,)))
    plain = 512 * (4 * 128 * 128 + 2 * 128 * 32)
    full, chunks, tops = (2 * 2 * 32 * scores for scores in (512 * 512, 512 * (2 + 3 * 16), 2 * 512))
    for path in (dynamic, fixed):
        assert graph_cost(path, dict.fromkeys(sample, (1, 512))).macs == plain + full + chunks + tops
    assert chunks + tops < full / 9


def test_engines_fuse_the_attention_of_chunks(exported: tuple[ModelView, Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: no engine can be built")
    half = tmp_path / "half.onnx"
    convert_precision(exported[1], half, "fp16")
    profiles = profiles_for(half, ExportSpec(), {"sequence": 512})
    info = build_engine(half, tmp_path / "e", resolve_target("sm86"), profiles=profiles)
    assert info.listing is not None
    assert info.listing.fused_attention == 3


# ------------------------------------------------------------------------------------------------------------ the pass


def test_heads_that_lose_nothing_get_bands_first() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    view.attention[1].read().output[:, 2] = 0.0  # what it sees does not matter
    plan, _ = make_plan(StreamHeadsPass(ratio=1 / 12, sink=1, recent=2), view, task, examples)
    assert plan.edits == (StreamHeads(layer=1, windows={2: 2}, sink=1, bidirectional=True),)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_statistic_is_the_change_of_the_layer_output(family: str) -> None:
    view = ModelView.of(make_model(family))
    task, examples = samples(view, family)
    layer, span = view.attention[0], Span(sink=1, recent=1)
    found = collect(view, task, examples, {Stat.WINDOW_COST}, span=span).values[Stat.WINDOW_COST][0]
    changes: list[torch.Tensor] = []
    plan = EditPlan(edits=(StreamHeads(layer=0, windows={1: 1}, sink=1, bidirectional=True),))
    for batch in examples.batches(32):
        inputs = {name: torch.as_tensor(array) for name, array in batch.inputs.items()}
        outputs: list[torch.Tensor] = []
        with torch.no_grad(), layer.watch_output(outputs.append):
            run(view.module, inputs)
            with surgery.twin(view, plan):
                run(view.module, inputs)
        change = (outputs[0] - outputs[1]).square().sum(-1)
        valid = batch.valid()
        changes.append(change.flatten() if valid is None else change[torch.as_tensor(valid)])
    assert float(found[1]) == pytest.approx(float(torch.cat(changes).mean()), rel=1e-3)


def test_a_run_of_the_pass_refits_and_may_give_every_head_a_band() -> None:
    view, teacher = (ModelView.of(make_model("bert")) for _ in range(2))
    task, examples = samples(view, "bert")
    pass_ = StreamHeadsPass(heads=((0, 1, 2, 3),) * LAYERS, sink=1, recent=2)
    record = run_pass(pass_, view, teacher, task, examples)
    assert record.refit
    assert record.twin_error < TWIN
    assert all(layer.windows == (2,) * HEADS for layer in view.layout.attention)


def test_gates_are_trained_on_bands() -> None:
    view = ModelView.of(make_model("bert"))
    task, examples = samples(view, "bert")
    training = GateTraining(steps=3, penalty=0.05)
    spans = (Span(sink=0, recent=1, training=training), Span(sink=0, recent=100, training=training))
    gates = [collect(view, task, examples, {Stat.STREAM_GATES}, span=span).values[Stat.STREAM_GATES] for span in spans]
    # A band that covers the text loses nothing: the penalty is all there is.
    assert float(torch.cat(gates[1]).mean()) < float(torch.cat(gates[0]).mean())


def test_heads_that_choose_their_tokens_have_no_bands() -> None:
    view = ModelView.of(make_model("bert"))
    surgery.apply(view, EditPlan(edits=(KeepTokens(layer=1, budget=TokenBudget(keep=0.5)),)))
    task, examples = samples(view, "bert")
    with pytest.raises(PlanError, match=r"heads of layer 1 keep 0\.5 of the tokens already"):
        make_plan(StreamHeadsPass(ratio=0.5, sink=1, recent=2), view, task, examples)
    with pytest.raises(PlanError, match="layer 1 is clustered, keeps a share of the tokens, or"):
        plan_of(view, (2,), 1).check(view.layout)


def test_limits_say_which_encoders_have_no_bands() -> None:
    reason = "stream-heads: refused, because windows are known for decoders without an encoder, and for encoders"
    for family in ("bart", "t5", "clip-text", "deberta-v2"):
        assert any(text.startswith(reason) for text in limits(ModelView.of(make_model(family))))
    for family in TEXTS + IMAGES:
        assert not any("stream-heads" in text for text in limits(ModelView.of(make_model(family))))
