"""Tasks: encoding, batches, reading, label-free signals, losses; with tiny models and a tokenizer made on the spot."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from headwise.calibration.data import DataSpec, Table
from headwise.calibration.tasks import (
    Batch,
    ClassificationOptions,
    Examples,
    FidelityOptions,
    LanguageOptions,
    MultiOutputOptions,
    RegressionOptions,
    SimilarityOptions,
    Task,
    TaskSpec,
    make_task,
)
from headwise.errors import DataError, PlanError
from headwise.model.checkpoint import Checkpoint
from headwise.model.forward import run, to_torch

DATA = DataSpec(path="unused.csv")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij"]


def tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **options,
    )


@pytest.fixture
def bert(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    module = transformers.BertModel(config).eval()
    tokenizer().save_pretrained(tmp_path)
    return Checkpoint(module=module, source="tiny", kind="transformers", digest="", folder=tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    module = transformers.LlamaForCausalLM(config).eval()
    tokenizer().save_pretrained(tmp_path)
    return Checkpoint(module=module, source="tiny", kind="transformers", digest="", folder=tmp_path)


class TwoOutputs(nn.Module):
    """Three classes and one value from a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = nn.Linear(4, 3)
        self.age = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"kind": self.kind(x), "age": self.age(x)}


def plain(module: nn.Module) -> Checkpoint:
    return Checkpoint(module=module.eval(), source="made", kind="module", digest="")


def table(**columns: Any) -> Table:
    return Table.of({role: v if isinstance(v, np.ndarray) else list(v) for role, v in columns.items()}, "made.csv")


def similarity(**options: Any) -> Task:
    return make_task(SimilarityOptions(type="sentence-similarity", data=DATA, **options))


def pairs(**changes: Any) -> Table:
    columns = {"first": ["a b c", "a", "d e"], "second": ["b", "c d e f g h", "a"], "score": ["5.0", "0", "2.5"]}
    return table(**{**columns, **changes})


def forward(
    task: Task, checkpoint: Checkpoint, examples: Examples, size: int = 8
) -> tuple[Batch, dict[str, torch.Tensor]]:
    batch = next(examples.batches(size))
    return batch, run(checkpoint.module, to_torch(batch.inputs))


# -- examples ---------------------------------------------------------------------------------------------------------


def test_batches_are_longest_first_whole_samples_and_padded(bert: Checkpoint) -> None:
    examples = similarity().encode(pairs(), bert)
    assert (len(examples), examples.per_sample, len(examples.rows)) == (3, 2, 6)
    assert examples.labels["embedding"].tolist() == [5.0, 0.0, 2.5]
    first, second = examples.batches(2)
    assert first.samples.tolist() == [1, 0]
    assert second.samples.tolist() == [2]
    assert first.inputs["input_ids"].tolist()[0] == [1, 4, 2, 0, 0, 0, 0, 0]
    valid = first.valid()
    assert valid is not None
    assert valid.sum(axis=1).tolist() == [3, 8, 5, 3]
    assert second.inputs["input_ids"].shape == (2, 4)
    assert set(first.inputs) == {"input_ids", "token_type_ids", "attention_mask"}


def test_the_digest_is_of_the_inputs_and_shared_samples_are_counted(bert: Checkpoint) -> None:
    task = similarity()
    examples = task.encode(pairs(), bert)
    assert task.encode(pairs(score=["1", "1", "2"]), bert).digest == examples.digest
    assert task.encode(pairs().select([2, 1, 0]), bert).digest != examples.digest
    part = task.encode(pairs().select([1]), bert, labels=False)
    other = task.encode(pairs(first=["a b c", "j", "j"]), bert)
    assert (part.shared_with(examples), examples.shared_with(part), other.shared_with(examples)) == (1, 1, 1)


def test_unique_rows_point_back(bert: Checkpoint) -> None:
    examples = similarity().encode(pairs(), bert)
    rows, index = examples.unique_rows()
    assert (len(rows), rows.per_sample) == (5, 1)
    for row, twin in zip(examples.rows, index, strict=True):
        assert np.array_equal(row["input_ids"], rows.rows[twin]["input_ids"])


def test_example_batch_always_has_padding(bert: Checkpoint) -> None:
    task = make_task(FidelityOptions(data=DATA))
    for texts in (["a b", "c", "d e f g"], ["a b", "c d"], ["a b"]):
        examples = task.encode(table(text=texts), bert)
        batch = examples.example_batch()
        assert batch["input_ids"].shape[0] == 2
        assert 0 < batch["attention_mask"].sum() < batch["attention_mask"].size
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert examples.dynamic_axes() == {"input_ids": (0, 1), "token_type_ids": (0, 1), "attention_mask": (0, 1)}


def test_dynamic_axes_of_arrays() -> None:
    same = Examples.of([{"x": np.zeros((3, 4))}, {"x": np.ones((3, 4))}], source="made")
    assert same.dynamic_axes() == {"x": (0,)}
    varying = Examples.of([{"x": np.zeros((3, 4))}, {"x": np.ones((3, 5))}], source="made")
    assert varying.dynamic_axes() == {"x": (0, 2)}


def test_rows_of_different_shapes_share_a_batch_only_with_a_mask() -> None:
    rows = [{"x": np.ones(n, dtype=np.float32)} for n in (2, 3, 2, 3)]
    plain_batches = list(Examples.of(rows, source="made").batches(4))
    assert [batch.inputs["x"].shape for batch in plain_batches] == [(2, 3), (2, 2)]
    assert Examples.of(rows, source="made").example_batch(2)["x"].shape == (2, 3)
    masked = [{**row, "src_padding_mask": np.zeros(len(row["x"]), dtype=bool)} for row in rows]
    (batch,) = Examples.of(masked, source="made", padding={"src_padding_mask": 1.0}).batches(4)
    valid = batch.valid()
    assert valid is not None
    assert valid.sum(axis=1).tolist() == [3, 3, 2, 2]


def test_scalar_inputs() -> None:
    examples = Examples.of([{"x": np.float32(1.0)[()], "y": np.asarray(2.0)} for _ in range(3)], source="made")
    (batch,) = examples.batches(4)
    assert batch.inputs["y"].tolist() == [2.0, 2.0, 2.0]
    assert batch.valid() is None


def test_no_samples() -> None:
    with pytest.raises(DataError, match="made gives no samples"):
        Examples.of([], source="made")


# -- text, images, arrays ---------------------------------------------------------------------------------------------


def test_texts_are_cut_to_the_models_positions(bert: Checkpoint) -> None:
    task = make_task(FidelityOptions(data=DATA))
    long = task.encode(table(text=["a " * 40]), bert)
    assert len(long.rows[0]["input_ids"]) == 12
    short = make_task(FidelityOptions(data=DATA, max_length=5)).encode(table(text=["a " * 40]), bert)
    assert short.rows[0]["input_ids"].tolist() == [1, 4, 4, 4, 2]
    with pytest.raises(DataError, match=r"max_length is 13\n.*12 positions"):
        make_task(FidelityOptions(data=DATA, max_length=13)).encode(table(text=["a"]), bert)


def test_roberta_has_fewer_positions_than_rows_in_its_table(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, pad_token_id=1,
    )  # fmt: skip
    tokenizer().save_pretrained(tmp_path)
    checkpoint = Checkpoint(
        module=transformers.RobertaModel(config).eval(), source="tiny", kind="transformers", digest="", folder=tmp_path
    )
    examples = make_task(FidelityOptions(data=DATA)).encode(table(text=["a " * 40]), checkpoint)
    assert len(examples.rows[0]["input_ids"]) == 10
    assert run(checkpoint.module, to_torch(next(examples.batches(1)).inputs))


def test_text_pairs_go_through_the_tokenizer_together(bert: Checkpoint) -> None:
    examples = make_task(FidelityOptions(data=DATA)).encode(table(text=["a b"], text_pair=["c"]), bert)
    assert examples.rows[0]["input_ids"].tolist() == [1, 4, 5, 2, 6, 2]
    assert examples.rows[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]


def test_text_without_tokenizer_or_of_numbers(bert: Checkpoint) -> None:
    task = make_task(FidelityOptions(data=DATA))
    with pytest.raises(DataError, match="no tokenizer in made"):
        task.encode(table(text=["a"]), plain(TwoOutputs()))
    with pytest.raises(DataError, match='column for "text" holds int64 values'):
        task.encode(table(text=np.arange(3)), bert)


def test_a_text_without_tokens_is_refused(llama: Checkpoint) -> None:
    assert llama.folder is not None
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    bare.save_pretrained(llama.folder)
    with pytest.raises(DataError, match=r"row 1 \(''\) has no tokens"):
        make_task(FidelityOptions(data=DATA)).encode(table(text=["a", ""]), llama)


def test_images_go_through_the_image_processor(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    module = transformers.ViTModel(config, add_pooling_layer=False).eval()
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    checkpoint = Checkpoint(module=module, source="tiny", kind="transformers", digest="", folder=tmp_path)
    grey = np.full((3, 28, 28), 255, dtype=np.uint8)
    examples = make_task(FidelityOptions(data=DATA)).encode(table(image=grey, label=np.arange(3)), checkpoint)
    assert examples.rows[0]["pixel_values"].shape == (3, 8, 8)
    assert examples.rows[0]["pixel_values"] == pytest.approx(1.0)
    arrays = make_task(FidelityOptions(data=DATA)).encode(table(image=grey), plain(nn.Flatten()))
    assert arrays.rows[0]["input"].dtype == np.float32
    assert arrays.rows[0]["input"].max() == 255


def test_other_roles_are_inputs_of_the_model() -> None:
    task = make_task(FidelityOptions(data=DATA))
    checkpoint = plain(TwoOutputs())
    assert task.encode(table(x=np.zeros((2, 4))), checkpoint).rows[0]["x"].dtype == np.float32
    assert task.encode(table(x=np.zeros((2, 4), dtype=np.int32)), checkpoint).rows[0]["x"].dtype == np.int64
    assert task.encode(table(x=["1", "2.5"]), checkpoint).rows[1]["x"] == 2.5
    with pytest.raises(DataError, match=r'"xx" is not an input of the model\n.*: x\n.*did you mean'):
        task.encode(table(xx=np.zeros((2, 4))), checkpoint)
    with pytest.raises(DataError, match="no column with model inputs"):
        task.encode(table(score=["1"]), checkpoint)
    with pytest.raises(DataError, match='column for "x" holds text'):
        task.encode(table(x=["one"]), checkpoint)


# -- sentence similarity ----------------------------------------------------------------------------------------------


def test_embeddings_ignore_padding(bert: Checkpoint) -> None:
    for pooling in ("mean", "max", "cls"):
        task = similarity(pooling=pooling)
        examples = task.encode(pairs(), bert)
        batch, outputs = forward(task, bert, examples)
        together = task.read({name: t.detach().numpy() for name, t in outputs.items()}, batch)["embedding"]
        for row, embedding in zip(np.repeat(batch.samples, 2) * 2 + np.tile([0, 1], 3), together, strict=True):
            alone = run(bert.module, to_torch({n: a[None] for n, a in examples.rows[row].items()}))["last_hidden_state"]
            expected = {"mean": alone[0].mean(0), "max": alone[0].amax(0), "cls": alone[0, 0]}[pooling]
            assert embedding == pytest.approx(expected.detach().numpy(), abs=1e-5)


def test_signal_and_loss_of_similarity(bert: Checkpoint) -> None:
    task = similarity()
    examples = task.encode(pairs(), bert)
    batch, outputs = forward(task, bert, examples)
    signal = task.signal(outputs, batch)
    assert signal.shape == (6, 16)
    assert signal.norm(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    cosine = (signal[0::2] * signal[1::2]).sum(1)
    target = torch.tensor([[1.0, 0.0, 0.5][i] for i in batch.samples])
    assert task.loss(outputs, batch, examples).tolist() == pytest.approx((cosine - target).square().tolist(), abs=1e-5)
    task.loss(outputs, batch, examples).sum().backward()
    with pytest.raises(PlanError, match=r"no labels.*\n.*contribution, gauss-newton"):
        task.loss(outputs, batch, task.encode(pairs(), bert, labels=False))


def test_pooling_comes_from_the_checkpoint(bert: Checkpoint) -> None:
    assert bert.folder is not None
    task = similarity()
    assert task.encode(pairs(), bert).facts["pooling"] == "mean"
    path = bert.folder / "1_Pooling" / "config.json"
    path.parent.mkdir()
    flags = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    for saved, expected in ((flags, "cls"), ({"pooling_mode": "max", "include_prompt": True}, "max")):
        path.write_text(json.dumps(saved))
        assert task.encode(pairs(), bert).facts["pooling"] == expected
    assert similarity(pooling="mean").encode(pairs(), bert).facts["pooling"] == "mean"
    path.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(DataError, match="pooling mean_tokens and weightedmean_tokens"):
        task.encode(pairs(), bert)


def test_length_comes_from_the_checkpoint(bert: Checkpoint) -> None:
    assert bert.folder is not None
    (bert.folder / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    assert max(len(row["input_ids"]) for row in similarity().encode(pairs(), bert).rows) == 4
    assert max(len(row["input_ids"]) for row in similarity(max_length=5).encode(pairs(), bert).rows) == 5


def test_the_pooled_output_can_be_chosen(bert: Checkpoint) -> None:
    states = np.arange(12, dtype=np.float32).reshape(2, 6)
    batch = Batch(inputs={}, samples=np.array([0]), per_sample=2, facts={"pooling": "mean"})
    assert np.array_equal(similarity().read({"sentence": states}, batch)["embedding"], states)
    both = {"pooler_output": states, "other": states + 1}
    assert np.array_equal(similarity(output="other").read(both, batch)["embedding"], states + 1)
    with pytest.raises(DataError, match=r'no output called "last_hidden_state"\n.*pooler_output, other'):
        similarity().read(both, batch)
    with pytest.raises(DataError, match=r"shape \(2, 2, 3, 1\)"):
        similarity().read({"x": states.reshape(2, 2, 3, 1)}, batch)
    assert np.isnan(similarity().metric_input("embedding", {"embedding": np.zeros((1, 2, 3))}, custom=False)).all()


# -- classification, regression, several outputs ----------------------------------------------------------------------


def two_outputs(**heads: Any) -> Task:
    outputs = heads or {"kind": {"type": "classification"}, "age": {"type": "regression", "column": "years"}}
    return make_task(MultiOutputOptions.model_validate({"type": "multi-output", "data": DATA, "outputs": outputs}))


def two_output_table(**changes: Any) -> Table:
    x = np.random.default_rng(0).normal(size=(6, 4))
    return table(**{"x": x, "kind": np.array([0, 1, 2, 0, 1, 2]), "years": np.arange(6) * 10.0, **changes})


def test_several_outputs() -> None:
    task, checkpoint = two_outputs(), plain(TwoOutputs())
    assert (task.outputs, task.roles(), task.roles(labels=False)) == (("kind", "age"), ("kind", "years"), ())
    examples = task.encode(two_output_table(), checkpoint)
    assert list(examples.rows[0]) == ["x"]
    assert examples.labels["age"].tolist() == [0, 10, 20, 30, 40, 50]
    batch, outputs = forward(task, checkpoint, examples)
    read = task.read({name: t.detach().numpy() for name, t in outputs.items()}, batch)
    assert (read["kind"].shape, read["age"].shape) == ((6, 3), (6,))
    spread = np.std(examples.labels["age"])
    signal = task.signal(outputs, batch)
    assert signal.shape == (6, 4)
    assert signal[:, 3].tolist() == pytest.approx((read["age"] / spread).tolist(), abs=1e-6)
    expected = nn.functional.cross_entropy(outputs["kind"], torch.tensor([0, 1, 2, 0, 1, 2]), reduction="none")
    error = (outputs["age"][:, 0] - torch.arange(6) * 10.0) / spread
    assert task.loss(outputs, batch, examples).tolist() == pytest.approx((expected + error**2).tolist(), abs=1e-4)
    unlabelled = task.encode(two_output_table(), checkpoint, labels=False)
    with pytest.raises(PlanError, match="samples of the multi-output task have no labels"):
        task.loss(outputs, batch, unlabelled)


def test_class_signal_is_the_fisher_metric() -> None:
    task = make_task(ClassificationOptions(type="classification", data=DATA, output="kind"))
    logits = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    batch = Batch(inputs={}, samples=np.array([0]), per_sample=1)
    jacobian = torch.autograd.functional.jacobian(lambda z: task.signal({"kind": z}, batch), logits)[0, :, 0]
    p = torch.softmax(logits[0], 0)
    assert torch.allclose(jacobian.T @ jacobian, torch.diag(p) - torch.outer(p, p))


def test_a_probability_that_underflows_keeps_a_finite_gradient() -> None:
    task = make_task(ClassificationOptions(type="classification", data=DATA))
    logits = torch.tensor([[0.0, 1000.0]], requires_grad=True)
    task.signal({"logits": logits}, Batch(inputs={}, samples=np.array([0]), per_sample=1)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_single_logit_is_a_yes_or_no() -> None:
    task = two_outputs(age={"type": "classification"})
    values = task.read({"age": np.array([[1.5], [-0.5]])}, Batch(inputs={}, samples=np.arange(2), per_sample=1))
    assert values["age"].tolist() == [[0.0, 1.5], [0.0, -0.5]]
    assert task.metric_input("age", values, custom=False).tolist() == [1, 0]
    assert task.metric_input("age", values, custom=True).shape == (2, 2)


@pytest.mark.parametrize(
    ("labels", "options", "label2id", "expected"),
    [
        (["2", "0"], {}, {}, [2, 0]),
        (np.array([2.0, 0.0]), {}, {}, [2, 0]),
        (["no", "yes", "no"], {}, {}, [0, 1, 0]),
        (["no", "yes"], {}, {"yes": 0, "no": 1, "maybe": 2}, [1, 0]),
        (["no", "yes"], {"classes": ("yes", "maybe", "no")}, {}, [2, 0]),
        (np.array([20, 10]), {"classes": ("10", "20")}, {}, [1, 0]),
    ],
)
def test_labels_become_class_ids(labels: Any, options: Any, label2id: dict[str, int], expected: list[int]) -> None:
    module = TwoOutputs()
    if label2id:
        config = transformers.PretrainedConfig(id2label={i: n for n, i in label2id.items()}, label2id=label2id)
        module.config = config  # type: ignore[assignment]
    task = make_task(ClassificationOptions(type="classification", data=DATA, output="kind", **options))
    examples = task.encode(table(x=np.zeros((len(labels), 4)), label=labels), plain(module))
    assert examples.labels["kind"].tolist() == expected


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", "b"], {"classes": ("a", "c")}, 'row 1 has the label "b", which is not among the classes'),
        (["0", "-1"], {}, "row 1 has the label '-1'.*\n.*whole number from 0"),
        (["0", "1.5"], {}, "row 1 has the label '1.5'"),
        (["0", "inf"], {"type": "regression"}, "row 1 has the label 'inf'.*\n.*a finite number"),
        (["0", ""], {"type": "regression"}, "row 1 has the label ''"),
    ],
)
def test_unusable_labels(labels: list[str], options: dict[str, Any], message: str) -> None:
    spec = TypeAdapter(TaskSpec).validate_python({"type": "classification", "data": DATA, "output": "kind", **options})
    with pytest.raises(DataError, match=message):
        make_task(spec).encode(table(x=np.zeros((2, 4)), label=labels), plain(TwoOutputs()))


@pytest.mark.parametrize(
    ("outputs", "kinds", "message"),
    [
        (
            {"kind": {"type": "classification"}},
            np.array([0, 3]),
            'output "kind" has 3 classes, but the labels go up to 3',
        ),
        ({"kind": {"type": "classification"}}, ["a", "b"], 'labels of output "kind" are 2 names, but the model has 3'),
        (
            {"kin": {"type": "classification", "column": "kind"}},
            np.array([0, 1]),
            'no output called "kin"\n.*kind, age\n.*mean',
        ),
        ({"kind": {"type": "regression"}}, np.array([0, 1]), r'output "kind" has the shape \(2, 3\)'),
    ],
)
def test_labels_that_do_not_match_the_outputs(outputs: dict[str, Any], kinds: Any, message: str) -> None:
    task, checkpoint = two_outputs(**outputs), plain(TwoOutputs())
    examples = task.encode(table(x=np.zeros((2, 4)), kind=kinds), checkpoint)
    batch, found = forward(task, checkpoint, examples)
    with pytest.raises(DataError, match=message):
        task.read({name: t.detach().numpy() for name, t in found.items()}, batch)
    with pytest.raises(DataError, match=message):
        task.loss(found, batch, examples)


def test_scores_per_token_are_no_class() -> None:
    task = make_task(ClassificationOptions(type="classification", data=DATA))
    with pytest.raises(DataError, match=r"shape \(1, 2, 3\)\n.*one vector of class scores"):
        task.read({"logits": np.zeros((1, 2, 3))}, Batch(inputs={}, samples=np.array([0]), per_sample=1))


def test_a_regression_head_of_transformers(bert: Checkpoint) -> None:
    config = bert.module.config
    config.num_labels = 1
    module = transformers.BertForSequenceClassification(config).eval()
    checkpoint = Checkpoint(module=module, source="tiny", kind="transformers", digest="", folder=bert.folder)
    task = make_task(RegressionOptions(type="regression", data=DATA, metric="pearson"))
    examples = task.encode(table(text=["a", "b c"], label=["1", "3"]), checkpoint)
    batch, outputs = forward(task, checkpoint, examples)
    assert task.read({n: t.detach().numpy() for n, t in outputs.items()}, batch)["logits"].shape == (2,)
    assert task.loss(outputs, batch, examples).shape == (2,)


# -- language modeling ------------------------------------------------------------------------------------------------


def language(**options: Any) -> Task:
    return make_task(LanguageOptions(type="language-modeling", data=DATA, **options))


def test_nats_agree_with_the_models_own_loss(llama: Checkpoint) -> None:
    texts = ["a b c d", "e", "f g"]
    task = language()
    examples = task.encode(table(text=texts), llama)
    batch, outputs = forward(task, llama, examples)
    read = task.read({n: t.detach().numpy() for n, t in outputs.items()}, batch)
    loss = task.loss(outputs, batch, examples)
    for row, sample in enumerate(batch.samples):
        ids = torch.as_tensor(examples.rows[sample]["input_ids"])[None]
        own = llama.module(input_ids=ids, labels=ids).loss.item()
        nats, tokens = read["logits:nll"][row]
        assert tokens == ids.shape[1] - 1
        assert nats / tokens == pytest.approx(own, abs=1e-5)
        assert loss[row].item() == pytest.approx(own, abs=1e-5)


def test_windows_predict_every_token_once(llama: Checkpoint) -> None:
    text = "a b c d e f g h i j a b c d e f"
    examples = language(max_length=5).encode(table(text=[text, "a"]), llama)
    windows = [row["input_ids"].tolist() for row in examples.rows]
    assert max(map(len, windows)) == 5
    predicted = [token for window in windows for token in window[1:]]
    assert predicted == [*range(4, 14), *range(4, 10), 2, 4, 2]
    assert all(left[-1] == right[0] for left, right in itertools.pairwise(windows[:-1]))
    assert max(len(row["input_ids"]) for row in language().encode(table(text=[text]), llama).rows) == 12


def test_token_signal_ignores_padding(llama: Checkpoint) -> None:
    task = language()
    examples = task.encode(table(text=["a b c d", "e"]), llama)
    batch, outputs = forward(task, llama, examples)
    signal = task.signal(outputs, batch).unflatten(1, (6, -1))  # type: ignore[no-untyped-call]
    # Each token's square roots of probabilities have length 2; averaged over tokens so has the row.
    assert signal.square().sum((1, 2)).tolist() == pytest.approx([4.0, 4.0], abs=1e-4)
    assert (signal[1, 3:] == 0).all()


def test_a_model_without_token_scores_is_no_language_model(llama: Checkpoint) -> None:
    examples = language().encode(table(text=["a b"]), llama)
    with pytest.raises(DataError, match=r"shape \(1, 3\)\n.*scores over the vocabulary"):
        language().read({"logits": np.zeros((1, 3))}, next(examples.batches(1)))


# -- fidelity ---------------------------------------------------------------------------------------------------------


def test_fidelity_reads_every_float_output(bert: Checkpoint) -> None:
    task = make_task(FidelityOptions(data=DATA))
    examples = task.encode(pairs(), bert)
    assert (examples.per_sample, examples.labels) == (2, {})
    batch, outputs = forward(task, bert, examples)
    arrays = {name: t.detach().numpy() for name, t in outputs.items()}
    read = task.read({**arrays, "count": np.ones((6, 1), dtype=np.int64)}, batch)
    assert set(read) == {"last_hidden_state", "pooler_output"}
    assert np.array_equal(read["last_hidden_state"], similarity().read(arrays, batch)["embedding"])
    assert task.signal(outputs, batch).shape == (6, 32)
    with pytest.raises(PlanError, match="the fidelity task have no labels"):
        task.loss(outputs, batch, examples)
    chosen = make_task(FidelityOptions(data=DATA, outputs=("pooler_output",)))
    assert set(chosen.read(arrays, batch)) == {"pooler_output"}
    with pytest.raises(DataError, match='no output called "pooled"'):
        make_task(FidelityOptions(data=DATA, outputs=("pooled",))).read(arrays, batch)
    with pytest.raises(DataError, match="no output of the model holds floating point"):
        task.read({"count": np.ones((6, 1), dtype=np.int64)}, batch)


def test_fidelity_of_class_scores(llama: Checkpoint) -> None:
    batch = Batch(inputs={}, samples=np.arange(2), per_sample=1, facts={"pooling": "mean"})
    scores = {"logits": np.array([[1.0, 3.0], [4.0, 2.0]]), "digit": np.array([[1.0, 0.0], [0.0, 1.0]])}
    task = make_task(FidelityOptions(data=DATA))
    read = task.read(scores, batch)
    assert set(read) == {"logits", "logits:argmax", "digit"}
    assert read["logits:argmax"].tolist() == [[1], [0]]
    named = make_task(FidelityOptions(data=DATA, classes=("digit",)))
    assert set(named.read(scores, batch)) == {"logits", "digit", "digit:argmax"}
    examples = task.encode(table(text=["a b c", "d"]), llama)
    batch, outputs = forward(task, llama, examples)
    (name,) = (found := task.read({n: t.detach().numpy() for n, t in outputs.items()}, batch))
    assert name == "logits:argmax"
    assert (found[name] >= 0).sum(axis=1).tolist() == [5, 3]
    assert task.signal(outputs, batch).shape == (2, 5 * len(WORDS))


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "sentence-similarity", "metric": "spaerman"}, 'did you mean "spearman"'),
        ({"type": "classification", "metric": "nats"}, "choose one of: accuracy, f1, matthews"),
        ({"type": "regression", "metric": "accuracy"}, "choose one of: mae, mse"),
        ({"type": "language-modeling", "metric": "nat"}, 'did you mean "nats"'),
        ({"type": "multi-output", "outputs": {}}, "name at least one output"),
        ({"type": "summarisation"}, "does not match any of the expected tags"),
        ({"type": "fidelity", "metric": "cosine"}, "Extra inputs are not permitted"),
    ],
)
def test_refused_specs(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(TaskSpec).validate_python({"data": DATA, **spec})


def test_custom_metrics_keep_their_direction() -> None:
    task = similarity(metric="mine:score", higher_is_better=False)
    (metric,) = task.metrics()
    assert (metric.output, metric.metric, metric.higher_is_better) == ("embedding", "mine:score", False)


def test_every_spec_makes_its_task_and_has_a_schema() -> None:
    schema = TypeAdapter(TaskSpec).json_schema()
    assert len(schema["oneOf"]) == 6
    head = {"type": "classification", "metric": "f1"}
    for kind in (
        "sentence-similarity",
        "classification",
        "regression",
        "language-modeling",
        "fidelity",
        "multi-output",
    ):
        options = {"outputs": {"a": head}} if kind == "multi-output" else {}
        spec = TypeAdapter(TaskSpec).validate_python({"type": kind, "data": DATA, **options})
        assert make_task(spec).spec is spec
