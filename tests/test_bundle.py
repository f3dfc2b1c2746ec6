"""``headwise bundle``: what is in a bundle, which runs become one, and the repository for Triton."""

from __future__ import annotations

import json
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import bundled, copy_of, engine_of_graph, manifest, opened, outcomes, run_with_report, sm86, with_engines
from click.testing import CliRunner
from fake_gpu import GraphEngine
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from runs import run, story_files

from headwise.artifacts import digest_file, digest_tree
from headwise.calibration.tasks import Examples
from headwise.cli import main
from headwise.device.arrays import Port
from headwise.device.verify import Wanted, verify
from headwise.errors import BundleError, DataError, ExportError, GateError, StorageError
from headwise.pipeline import stages
from headwise.pipeline.bundle import make
from headwise.pipeline.bundle.files import write_archive
from headwise.pipeline.bundle.golden import cache_codes, golden_inputs
from headwise.pipeline.bundle.make import make_bundle
from headwise.pipeline.bundle.parts import find_parts
from headwise.pipeline.bundle.triton import config, write_repository
from headwise.tolerances import GOLDEN


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def test_the_manifest_lists_every_file(base: Path) -> None:
    bundle = bundled("plain", base)
    found = manifest(bundle)
    there = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert found["files"].keys() == there.keys() - {"manifest.json"}
    for name, recorded in found["files"].items():
        assert recorded == {"sha256": digest_file(there[name]), "bytes": there[name].stat().st_size}


def test_nothing_in_a_bundle_names_a_place(base: Path) -> None:
    for kind in ("plain", "story"):
        for path in bundled(kind, base).rglob("*"):
            assert not path.is_file() or str(base).encode() not in path.read_bytes(), path


def test_artifacts_say_what_they_are(base: Path) -> None:
    found = manifest(bundled("plain", base))
    onnx, engine = found["artifacts"]
    assert (onnx["name"], onnx["precision"], onnx["stage"]) == ("onnx", "fp32", "cpu")
    assert (engine["name"], engine["sm"], engine["runtime"], engine["precision"]) == (
        "sm86",
        86,
        "tensorrt-rtx",
        "fp16",
    )
    assert engine["inputs"] == {"tokens": ["float16", ["batch", 5, 32]]}
    assert {name: dtype for name, (dtype, _) in onnx["outputs"].items()} == {"digit": "float32", "parity": "float32"}
    assert engine["profiles"] == found["sources"][0]["profiles"]
    assert engine["profiles"][0]["tokens"]["max"] == [8, 5, 32]
    assert found["sources"][0]["file"] == "graphs/engine/model.onnx"
    assert found["targets"] == ["sm86", "tensorrt/sm87"]
    assert sum(len(layer["query"]) for layer in found["layout"]["attention"]) == 9, "a quarter of 12 heads is gone"


def test_evidence_says_where_it_was_measured(base: Path) -> None:
    found = manifest(bundled("plain", base))["evidence"]
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert found["outcome"] == "pass"
    assert found["data"]["task"]["samples"] == 60
    assert stages["prune-heads"]["measured_on"] == found["environment"]["device"]
    assert stages["prune-heads"]["verdicts"][0]["outcome"] == "PASS"
    assert stages["engine-sm86"]["measured_on"] is None, "there is no GPU here"
    assert stages["cpu"]["cost"]["macs"] < stages["baseline"]["cost"]["macs"]


def test_a_decoder_has_a_case_with_a_past(base: Path) -> None:
    bundle = bundled("story", base)
    found = manifest(bundle)
    assert list(found["cases"]) == ["batch", "short", "step"]
    arrays = {case: np.load(bundle / file) for case, file in found["cases"].items()}
    assert arrays["batch"]["past_key_values.0.key"].shape[2] == 0
    assert arrays["batch"]["input_ids"].shape[1] > arrays["short"]["input_ids"].shape[1]
    assert arrays["step"]["input_ids"].shape == (4, 1)
    past = arrays["step"]["past_key_values.1.value"].shape[2]
    assert past > 0
    assert arrays["step"]["attention_mask"].shape == (4, past + 1)
    assert arrays["step"]["position_ids"].tolist() == [[past]] * 4
    assert len(found["sources"][0]["profiles"]) == 2
    assert found["sources"][0]["tolerance"]["logits"] == GOLDEN["fp16"]
    assert (bundle / "processor" / "tokenizer.json").exists()
    assert (bundle / "processor" / "generation_config.json").exists()


def test_single_tokens_run_with_the_shapes_that_are_theirs(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GraphEngine] = []

    def load(data: bytes) -> GraphEngine:
        made.append(GraphEngine(data))
        return made[-1]

    sm86(monkeypatch, load=load)
    found = verify(opened(bundled("story", base)), Wanted(rounds=0))
    assert outcomes(found.checks) == dict.fromkeys(("files", "runtime", "ports", "golden"), "PASS")
    assert found.artifact == "sm86"
    assert made[0].profiles == [1], "the step; the other cases ran before it, with the shapes that a new engine has"


def test_single_tokens_may_have_a_graph_and_an_engine_of_their_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_with_report("story", base, tmp_path)
    for name in ("model.onnx", "model.engine"):
        for path in out.glob(f"*/{name}"):
            shutil.copyfile(path, path.with_name(name.replace("model", "decode")))
            stored = json.loads((path.parent / "manifest.json").read_text())
            stored["files"] = digest_tree(path.parent)
            (path.parent / "manifest.json").write_text(json.dumps(stored))
    made = make_bundle(out, tmp_path / "bundle", triton=True)
    found = {artifact["name"]: artifact for artifact in made["artifacts"]}
    assert list(found) == ["onnx", "onnx-decode", "sm86", "sm86-decode"]
    assert list(found["sm86-decode"]["golden"]) == ["step"]
    assert [len(artifact["profiles"]) for artifact in made["sources"]] == [1, 1]
    assert found["sm86-decode"]["profiles"][0]["input_ids"]["max"] == (8, 1)
    assert made["triton"] == ["bundle", "bundle-decode"]
    sm86(monkeypatch)
    result = verify(opened(tmp_path / "bundle"), Wanted(rounds=0))
    assert result.artifact == "sm86"
    assert result.exit_code == 0
    assert 'sm86-decode: output "logits" is within' in " ".join(check.found for check in result.checks)
    monkeypatch.setattr(GraphEngine, "execute_async_v3", lambda *arguments: False)
    assert verify(opened(tmp_path / "bundle"), Wanted(artifact="sm86-decode")).exit_code == 1


def test_golden_inputs_fit_the_engines(base: Path, tmp_path: Path) -> None:
    batch = {"min": 6, "opt": 6, "max": 7}
    out = run_with_report("plain", base, tmp_path, recipe__export__batch=batch)
    for samples, rows in ((1, 6), (100, 7)):
        made = make_bundle(out, tmp_path / "bundle", samples=samples)
        assert np.load(tmp_path / "bundle" / made["cases"]["batch"])["tokens"].shape[0] == rows


def test_a_run_without_engines_has_no_graph_for_them(base: Path, tmp_path: Path) -> None:
    stages = json.loads((with_engines("plain", base) / "out" / "report.json").read_text())["stages"]
    kept = [stage for stage in stages if stage["kind"] != "engine"]
    out = run_with_report("plain", base, tmp_path, recipe__targets=[], stages=kept)
    found = make_bundle(out, tmp_path / "bundle")
    assert found["sources"] == []
    assert [artifact["stage"] for artifact in found["artifacts"]] == ["onnx"]
    assert "Build the engine" not in (tmp_path / "bundle" / "README.md").read_text()


def test_the_readme_has_the_commands(base: Path) -> None:
    text = (bundled("plain", base) / "README.md").read_text()
    assert "python headwise-verify.pyz verify --engine sm86" in text
    assert "python headwise-verify.pyz build --runtime tensorrt " in text
    assert "Not built yet, because that takes the device: tensorrt/sm87" in text
    assert "--minShapes=tokens:1x5x32" in text
    assert "--stronglyTyped" in text
    assert "| prune-heads | digit | accuracy |" in text


def test_the_archive_is_the_same_every_time_and_small(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_archive(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
    assert all(name.startswith(("__main__", "headwise/device/")) or name.count("/") == 1 for name in names)
    assert "headwise/device/engine_worker.py" in names
    assert (tmp_path / "a").stat().st_size < 200_000


@pytest.mark.parametrize("outcome", ["fail", "error", "interrupted"])
def test_a_run_that_did_not_pass_is_refused(base: Path, tmp_path: Path, outcome: str) -> None:
    out = run_with_report("plain", base, tmp_path, outcome=outcome, reason="the gate said no")
    with pytest.raises(GateError, match=f"the run ended with {outcome}: the gate said no") as caught:
        make_bundle(out, tmp_path / "bundle")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "bundle").exists()


def test_a_run_that_lacks_only_its_engines_is_taken(base: Path, tmp_path: Path) -> None:
    report = json.loads((with_engines("plain", base) / "out" / "report.json").read_text())
    find_parts(with_engines("plain", base) / "out", {**report, "outcome": "not-run"})
    report["stages"][2]["status"] = "skipped"
    with pytest.raises(GateError, match="the run ended with not-run"):
        find_parts(with_engines("plain", base) / "out", {**report, "outcome": "not-run"})


def test_limits_of_a_pass_are_no_matter_here(base: Path, tmp_path: Path) -> None:
    report = json.loads((with_engines("plain", base) / "out" / "report.json").read_text())
    gate = {**report["recipe"]["gate"], "stages": {"prune-heads": {"max_drop": 5.0}}}
    out = run_with_report("plain", base, tmp_path, recipe={**report["recipe"], "gate": gate})
    assert make_bundle(out, tmp_path / "bundle")["name"] == "bundle"


def test_a_damaged_stage_is_named(base: Path, tmp_path: Path) -> None:
    out = run_with_report("plain", base, tmp_path)
    graph = out / "02-onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    report = json.loads((out / "report.json").read_text())
    report["stages"] = [stage for stage in report["stages"] if stage["name"] in ("baseline", "prune-heads", "onnx")]
    with pytest.raises(StorageError, match="the stage onnx of the run cannot be used: its files were changed"):
        find_parts(out, report)


def test_only_a_bundle_is_replaced(base: Path, tmp_path: Path) -> None:
    out = with_engines("plain", base) / "out"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("dear")
    with pytest.raises(BundleError, match=r"photos cannot be replaced: .*photos has no manifest\.json"):
        make_bundle(out, tmp_path / "photos")
    assert (tmp_path / "photos" / "me.jpg").exists()
    bundle = copy_of("plain", base, tmp_path)
    (bundle / "local.json").write_text("{}")
    with pytest.raises(BundleError, match=r"cannot be replaced: .*local\.json has the schema") as caught:
        make_bundle(out, bundle)
    assert "or delete it yourself" in caught.value.fix
    (bundle / "local.json").unlink()
    (bundle / "old").touch()
    make_bundle(out, bundle)
    assert not (bundle / "old").exists()


def test_samples_that_no_engine_takes_are_an_error(base: Path) -> None:
    row = {"x": np.zeros((5, 32), np.float32)}
    examples = Examples.of([row], source="test.npz")
    profiles = {"x": {"min": (1, 6, 32), "opt": (1, 6, 32), "max": (8, 9, 32)}}
    with pytest.raises(DataError, match=r"no sample of test\.npz has a size that the engines take"):
        golden_inputs(examples, bundled("plain", base) / "graphs" / "onnx" / "model.onnx", profiles, 4)


def test_golden_outputs_have_to_come_out_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = make.golden_outputs

    def other(*arguments: Any) -> Any:
        return {c: {n: array + 1 for n, array in found.items()} for c, found in real(*arguments).items()}

    monkeypatch.setattr(make, "golden_outputs", other)
    with pytest.raises(ExportError, match='does not give its own golden outputs: output "digit" is'):
        make_bundle(with_engines("plain", base) / "out", tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_made(base: Path, tmp_path: Path) -> None:
    command = [
        "bundle",
        str(with_engines("plain", base) / "out"),
        "--out",
        str(tmp_path / "my b"),
        "--triton",
        "--samples",
        "2",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "onnx, sm86; " in result.stdout
    assert shlex.split(result.stdout.splitlines()[-1])[-1] == str(tmp_path / "my b")
    assert "the ONNX graph, because Triton loads engines of full TensorRT only" in result.stdout
    assert CliRunner().invoke(main, ["bundle", str(tmp_path), "--out", str(tmp_path / "c")]).exit_code == 2


def triton_message() -> Any:
    """The part of Triton's ModelConfig that is written here, as its model_config.proto has it."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", syntax="proto3")
    types = ["INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"]
    enum = file.enum_type.add(name="DataType")
    for number, name in enumerate([*types, "FP16", "FP32", "FP64", "STRING", "BF16"]):
        enum.value.add(name=f"TYPE_{name}", number=number)

    def message(name: str, fields: list[tuple[str, int, bool, str]]) -> None:
        made = file.message_type.add(name=name)
        for number, (label, kind, repeated, of) in enumerate(fields, start=1):
            many = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            made.field.add(name=label, number=number, type=kind, label=many, type_name=of or None)

    message("Reshape", [("shape", field.TYPE_INT64, True, "")])
    port = [("name", field.TYPE_STRING, False, ""), ("data_type", field.TYPE_ENUM, False, ".DataType")]
    port += [("dims", field.TYPE_INT64, True, ""), ("reshape", field.TYPE_MESSAGE, False, ".Reshape")]
    message("Port", port)
    message("Batching", [])
    config = [(name, field.TYPE_STRING, False, "") for name in ("name", "backend")]
    config += [("max_batch_size", field.TYPE_INT32, False, "")]
    config += [(name, field.TYPE_MESSAGE, True, ".Port") for name in ("input", "output")]
    message("Config", [*config, ("dynamic_batching", field.TYPE_MESSAGE, False, ".Batching")])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Config"))()


def parsed(text: str) -> Any:
    return text_format.Parse(text, triton_message())


def dims(ports: Any) -> dict[str, list[int]]:
    return {port.name: list(port.dims) for port in ports}


def test_triton_serves_the_graph_of_a_decoder(base: Path) -> None:
    folder = bundled("story", base) / "triton" / "bundle"
    found = parsed((folder / "config.pbtxt").read_text())
    assert (found.name, found.backend, found.max_batch_size) == ("bundle", "onnxruntime", 8)
    assert dims(found.input)["input_ids"] == [-1]
    assert dims(found.input)["past_key_values.0.key"] == [4, -1, 8]
    assert dims(found.output)["logits"] == [-1, 24]
    assert found.HasField("dynamic_batching")
    assert {port.data_type for port in found.input} == {9, 11}
    assert (folder / "1" / "model.onnx").exists()


def artifact(**changes: Any) -> dict[str, Any]:
    ports = {"x": Port("bfloat16", ("batch", "sequence", 4))}
    outputs = {"y": Port("float16", ("batch", 2)), "z": Port("float32", ("batch",))}
    plain = {"file": "engines/sm87.engine", "precision": "bf16", "runtime": "tensorrt", "inputs": ports}
    return {**plain, "outputs": outputs, **changes}


def test_triton_serves_an_engine_of_full_tensorrt() -> None:
    found = parsed(config("m", artifact(), 16))
    assert (found.backend, found.max_batch_size) == ("tensorrt", 16)
    assert dims(found.input) == {"x": [-1, 4]}
    assert found.input[0].data_type == 14
    assert dims(found.output) == {"y": [2], "z": [1]}
    assert list(found.output[1].reshape.shape) == []
    assert found.output[1].HasField("reshape")


def test_triton_batches_nothing_where_an_output_has_no_batch() -> None:
    found = parsed(config("m", artifact(outputs={"y": Port("float32", (3, "n"))}), 16))
    assert found.max_batch_size == 0
    assert dims(found.input) == {"x": [-1, -1, 4]}
    assert not found.HasField("dynamic_batching")


def test_the_repository_takes_engines_of_full_tensorrt_first(base: Path, tmp_path: Path) -> None:
    bundle = copy_of("plain", base, tmp_path)
    found = manifest(bundle)
    found["artifacts"][1]["runtime"] = "tensorrt"
    found["name"] = "my model"
    assert write_repository(bundle, found) == ["my_model-sm86"]
    assert (bundle / "triton" / "my_model-sm86" / "1" / "model.plan").exists()


def test_the_folder_of_every_graph_says_how_to_feed_it(base: Path) -> None:
    folder = with_engines("story", base)
    graphs = [path.parent for path in (folder / "out").glob("*/model.onnx") if "." not in path.parent.name]
    assert len(graphs) > 2
    for graph in graphs:
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (graph / name).read_bytes() == (folder / "checkpoint" / name).read_bytes()


def test_triton_has_no_fp8(base: Path) -> None:
    artifact = {**manifest(bundled("story", base))["artifacts"][0]}
    artifact["inputs"] = {**artifact["inputs"], "past": ["float8_e4m3fn", ["batch", 2]]}
    with pytest.raises(BundleError, match="no type for the float8_e4m3fn of past"):
        config("x", artifact, 4)


def test_a_past_of_codes_is_that_of_the_graph_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = story_files(tmp_path / "run")
    monkeypatch.setattr(stages, "build_engine", engine_of_graph)
    # No graph for the CPU: that of ONNX Runtime has a cache of numbers.
    run(
        folder,
        "passes=[{quantize: {matrices: {'*': float}, kv: int8, smooth: null}}]",
        "targets=[sm89]",
        "gate={max_drop: 5}",
    )
    made = make_bundle(folder / "out", tmp_path / "bundle")
    assert sorted(made["cases"]) == ["batch", "short", "step", "step-engine"]
    (source,) = made["sources"]
    assert set(made["artifacts"][0]["golden"]) == {"batch", "short", "step"}
    assert set(source["golden"]) == {"batch", "short", "step-engine"}
    plain, coded = (np.load(tmp_path / "bundle" / made["cases"][case]) for case in ("step", "step-engine"))
    past = coded["past_key_values.0.key"]
    assert past.dtype == np.int8
    assert plain["past_key_values.0.key"].dtype == np.float32
    assert past.shape == plain["past_key_values.0.key"].shape
    # All of the range is used, which numbers cut off to whole ones would not do.
    assert len(np.unique(past)) > 40


def test_a_cache_of_fp8_cannot_be_bundled(tmp_path: Path) -> None:
    past, present = "past_key_values.0.key", "present.0.key"
    kind = onnx.TensorProto.FLOAT8E4M3FN
    ports = [onnx.helper.make_tensor_value_info(name, kind, ["b", 2]) for name in (past, present)]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", [past], [present])], "g", ports[:1], ports[1:])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "model.onnx"))
    with pytest.raises(BundleError, match=r"stored in fp8.*\n.*\n.*set kv: int8"):
        cache_codes(tmp_path / "model.onnx")
