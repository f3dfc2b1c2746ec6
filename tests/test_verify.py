"""``headwise verify``: every way in which a bundle or a device is not what it should be, and the self-test."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import bundled, copy_of, manifest, opened, outcomes, sm86, write_manifest
from click.testing import CliRunner, Result
from fake_gpu import Driver, GraphEngine, fake_device

import headwise.device
from headwise.cli import main
from headwise.device import builder, cuda, runtimes
from headwise.device.arrays import Port, as_float32, restore, store
from headwise.device.bundle import Artifact, Bundle
from headwise.device.checks import check_golden, check_ports
from headwise.device.cli import main as device
from headwise.device.loading import takes
from headwise.device.machine import cpu_model, peak_memory
from headwise.device.rebuild import rebuild
from headwise.device.verify import Wanted, verify
from headwise.errors import BundleError, MachineError

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: no engine can be built"
)


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def bundle(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a bundle with an engine for sm86, on a machine without a GPU."""
    monkeypatch.setattr(cuda, "_library", lambda: None)
    return copy_of("plain", base, tmp_path)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(device, ["verify", *map(str, arguments)])


def swapped(outputs: dict[str, Any]) -> dict[str, Any]:
    return {"digit": outputs["parity"], "parity": outputs["digit"]}


def engine(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], GraphEngine]:
    return lambda data: GraphEngine(data, change)


def test_a_whole_bundle_passes_on_onnx_runtime(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(bundle), "--rounds", "3", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["artifact"], found["exit_code"]) == ("onnx", 0)
    assert found["note"] == "no engine was run: no GPU; there is sm86 (sm86)"
    checks = found["checks"]
    assert [check["name"] for check in checks] == ["files", "runtime", "ports", "golden", "golden", "latency", "memory"]
    assert {check["outcome"] for check in checks} == {"PASS"}
    assert [check["values"].get("output") for check in checks[3:5]] == ["digit", "parity"]
    assert checks[1]["values"] == {
        "runtime": "onnxruntime",
        "version": onnxruntime.__version__,
        "device": cpu_model(),
        "golden_version": onnxruntime.__version__,
    }
    assert f" on {cpu_model()}; " in checks[1]["found"]
    latency = checks[5]["values"]
    assert 0 < latency["p50_ms"] <= latency["p90_ms"] <= latency["p99_ms"]
    assert latency["rounds"] == 3
    assert checks[6]["values"]["peak_bytes"] > 1 << 20


def test_an_engine_on_its_gpu_passes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch)
    result = call(bundle, "--rounds", 2)
    assert result.exit_code == 0, result.output
    assert "bundle: sm86\n" in result.output
    assert "tensorrt_rtx 1.7 on NVIDIA Test, sm86" in result.output
    assert 'PASS     golden    output "parity" is within' in result.output
    assert "device memory of the engine" in result.output


def test_a_changed_file_is_named(bundle: Path) -> None:
    graph = bundle / "graphs" / "onnx" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    result = call(bundle, "--onnx")
    assert result.exit_code == 1
    assert "FAIL     files     the content of graphs/onnx/model.onnx has changed: sha256" in result.output
    assert "NOT RUN  golden    because of what files found" in result.output


def test_a_damaged_file_of_another_artifact_fails_and_the_rest_is_run(bundle: Path) -> None:
    (bundle / "README.md").write_text("hello")
    (bundle / "engines" / "sm86.engine").unlink()
    result = call(bundle, "--rounds", 0)
    assert result.exit_code == 1
    assert "README.md has 5 bytes" in result.output
    assert "engines/sm86.engine is missing in the bundle" in result.output
    assert 'PASS     golden    output "digit"' in result.output
    assert "latency" not in result.output
    assert call(bundle, "--onnx").exit_code == 0, "its own files are whole"


def test_a_truncated_engine_is_never_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(data: bytes) -> Any:
        raise AssertionError("loaded")

    sm86(monkeypatch, load=never)
    path = bundle / "engines" / "sm86.engine"
    path.write_bytes(path.read_bytes()[:100])
    result = call(bundle, "--engine", "sm86")
    assert result.exit_code == 1
    assert "FAIL     files     the engine engines/sm86.engine is truncated: 100 of " in result.output


def test_another_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, driver=Driver(sm=89))
    result = call(bundle, "--engine", "sm86")
    assert result.exit_code == 4
    assert "NOT RUN  runtime   NVIDIA Test is sm89" in result.output
    assert "python headwise-verify.pyz build --runtime tensorrt-rtx" in result.output
    assert "no engine was run: this GPU is sm89" in call(bundle, "--rounds", 0).output


def test_no_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch)
    monkeypatch.setattr(cuda, "_library", lambda: None)
    result = call(bundle, "--engine", "sm86")
    assert result.exit_code == 4
    assert "NOT RUN  runtime   no GPU\n" in result.output
    assert "NOT RUN  golden    because of what runtime found" in result.output


def test_another_version_of_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch, version="1.8")
    for arguments in ((bundle,), (bundle, "--engine", "sm86")):
        result = call(*arguments)
        assert result.exit_code == 4, "no graph is run in the place of the engine for this GPU"
        assert "NOT RUN  runtime   tensorrt_rtx 1.8" in result.output
        assert "1.7, which built the engine" in result.output
        assert "or install version 1.7" in result.output


def test_a_missing_runtime(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for runtime in ("tensorrt-rtx", "onnxruntime"):
        monkeypatch.setitem(runtimes.MODULES, runtime, "no_such_runtime")
    for arguments in ((bundle, "--engine", "sm86"), (bundle, "--onnx"), (bundle,)):
        result = call(*arguments)
        assert result.exit_code == 4
        assert "NOT RUN  runtime   no_such_runtime cannot be imported" in result.output


def test_a_runtime_that_refuses_the_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch, load=lambda data: None)
    result = call(bundle)
    assert result.exit_code == 4
    assert "NOT RUN  runtime   tensorrt_rtx 1.7 refuses sm86.engine on NVIDIA Test (sm86)" in result.output


def test_swapped_outputs_of_other_shapes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch, load=engine(swapped))
    result = call(bundle)
    assert result.exit_code == 1
    assert 'FAIL     ports     the outputs "digit" and "parity" are swapped' in result.output


def test_a_renamed_output(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch, load=engine(lambda outputs: {"number": outputs["digit"], "parity": outputs["parity"]}))
    result = call(bundle)
    assert result.exit_code == 1
    assert 'FAIL     ports     output "digit" was renamed: it is called "number"' in result.output


def test_an_engine_that_computes_something_else(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(outputs: dict[str, Any]) -> dict[str, Any]:
        parity = outputs["parity"]
        return {**outputs, "parity": parity * np.float16(1.1) if isinstance(parity, np.ndarray) else parity}

    sm86(monkeypatch, load=engine(wrong))
    result = call(bundle)
    assert result.exit_code == 1
    assert 'PASS     golden    output "digit"' in result.output
    assert 'FAIL     golden    output "parity" is 0.1 of its largest value away from the golden output' in result.output
    assert "at most 0.02 for fp16" in result.output
    assert "NOT RUN  latency" in result.output
    assert call(bundle, "--tolerance", 0.2).exit_code == 0


def test_an_engine_that_takes_other_shapes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch)
    monkeypatch.setattr(GraphEngine, "set_input_shape", lambda *arguments: False)
    profile = lambda *arguments: [(9, 5, 32)] * 3  # noqa: E731
    monkeypatch.setattr(GraphEngine, "get_tensor_profile_shape", profile, raising=False)
    result = call(bundle)
    assert result.exit_code == 1
    assert "FAIL     golden    input tokens has shape (4, 5, 32)" in result.output


def artifact(outputs: dict[str, Port], inputs: dict[str, Port] | None = None) -> Artifact:
    facts = {"name": "sm86", "file": "e", "files": ("e",), "runtime": "tensorrt", "version": "1", "precision": "fp16"}
    tolerance = dict.fromkeys(outputs, 0.01)
    ports = {"inputs": inputs or {}, "outputs": outputs}
    return Artifact(**facts, **ports, golden={}, tolerance=tolerance)  # type: ignore[arg-type]


def test_swapped_outputs_of_equal_shape_show_in_their_values() -> None:
    made = artifact(dict.fromkeys(("a", "b", "c"), Port("float32", ("n", 2))))
    golden = {"batch": {"a": np.array([[1.0, 2]]), "b": np.array([[5.0, -3]]), "c": np.array([[7.0, 7]])}}
    found = {"batch": {"a": golden["batch"]["b"], "b": golden["batch"]["a"], "c": golden["batch"]["c"]}}
    checks = check_golden(made, golden, found)
    assert [check.outcome for check in checks] == ["FAIL", "FAIL", "PASS"]
    assert checks[0].found == 'output "a" gives what output "b" should give: the outputs are swapped'


def test_values_that_are_not_finite_and_other_shapes_fail() -> None:
    made = artifact({"a": Port("float32", ("n",)), "zero": Port("float32", ("n",))})
    golden = {"batch": {"a": np.ones(2), "zero": np.zeros(2)}}
    for bad in (np.array([1, np.nan]), np.array([1, np.inf]), np.ones(3)):
        checks = check_golden(made, golden, {"batch": {"a": bad, "zero": np.zeros(2)}})
        assert [check.outcome for check in checks] == ["FAIL", "PASS"]
        assert "has other shapes than the golden output, or values that are not finite" in checks[0].found
    assert check_golden(made, golden, {"batch": {"a": np.ones(2), "zero": np.full(2, 1e-9)}})[1].outcome == "FAIL"


def test_cached_outputs_share_a_line_while_they_are_right() -> None:
    names = ("logits", "present.0.key", "present.0.value")
    made = artifact(dict.fromkeys(names, Port("float32", ("n",))))
    golden = {"step": dict.fromkeys(names, np.ones(2))}
    found = {"step": {**golden["step"], "present.0.key": np.full(2, 1.005)}}
    checks = check_golden(made, golden, found)
    assert [check.found.partition(" is")[0] for check in checks] == [
        'output "logits"',
        '2 cached outputs; of the worst, output "present.0.key"',
    ]
    found["step"]["present.0.value"] = np.zeros(2)
    assert [check.outcome for check in check_golden(made, golden, found)] == ["PASS", "FAIL", "PASS"]


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ({"x": Port("int64", ("n", 4))}, None),
        ({"x": Port("int64", ("any", "any"))}, None),
        ({"x": Port("int32", ("n", 4))}, 'input "x" is int32 (n, 4)'),
        ({"x": Port("int64", ("n", 5))}, 'input "x" is int64 (n, 5)'),
        ({"x": Port("int64", ("n",))}, 'input "x" is int64 (n)'),
        ({"y": Port("bool", ("n", 4))}, 'input "x" is missing; there are y'),
        ({"x": Port("int64", ("n", 4)), "y": Port("bool", ())}, 'input "y" is not in the manifest'),
    ],
)
def test_ports(ports: dict[str, Port], message: str | None) -> None:
    found = check_ports(artifact({}, {"x": Port("int64", ("batch", 4))}), ports, {})
    assert found.outcome == ("PASS" if message is None else "FAIL")
    assert message is None or found.found == message


def test_bfloat16_by_hand() -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, 3.3895314e38, np.inf, -np.inf, 1e-40], np.float32)
    back = restore(store(values, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(back[:4], [1, 1, 1 + 2**-6, -2.5])
    assert back[5:7].tolist() == [np.inf, -np.inf]
    assert np.isnan(restore(store(np.array([np.nan]), "bfloat16"), "bfloat16")).all()
    assert as_float32(np.ones(1, np.float16)).dtype == np.float32
    assert store(np.ones(1), "float16").dtype == np.float16


def test_which_shapes_a_profile_takes() -> None:
    profile = {"x": {"min": (1, 1), "opt": (1, 1), "max": (8, 1)}}
    assert takes(profile, {"x": np.zeros((8, 1))})
    assert not takes(profile, {"x": np.zeros((8, 2))})


def test_this_machine_has_a_name_and_memory() -> None:
    assert cpu_model()
    assert sys.platform == "win32" or peak_memory()


# what is no bundle


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    result = call(tmp_path)
    assert result.exit_code == 2
    assert "has no manifest.json" in result.output
    assert call().exit_code == 2
    assert "no bundle was named" in call().output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "manifest.json cannot be read"),
        ("[]", 'manifest.json has the schema "None"'),
        ('{"schema": "headwise.bundle/9"}', 'manifest.json has the schema "headwise.bundle/9"'),
        ('{"schema": "headwise.bundle/1"}', "manifest.json was changed since the bundle was made"),
    ],
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path)
    assert message in str(caught.value)


def test_a_manifest_without_what_it_needs(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"schema": "headwise.bundle/1"})
    with pytest.raises(BundleError, match=r"manifest\.json lacks or cannot use 'name'"):
        Bundle.open(tmp_path)


def test_a_manifest_that_was_edited_is_refused(bundle: Path) -> None:
    found = manifest(bundle)
    found["artifacts"][0]["tolerance"]["digit"] = 10.0
    (bundle / "manifest.json").write_text(json.dumps(found))
    for options in ((), ("--onnx",), ("--selftest",)):
        result = call(bundle, *options)
        assert result.exit_code == 2
        assert "manifest.json was changed since the bundle was made" in result.output


@pytest.mark.parametrize("content", ["{", '{"schema": "headwise.bundle/1"}'])
def test_a_damaged_file_of_this_device_can_go(bundle: Path, content: str) -> None:
    (bundle / "local.json").write_text(content)
    result = call(bundle)
    assert result.exit_code == 2
    assert "local.json" in result.output
    assert "delete it: it holds only what was added on this device" in result.output


def test_options_that_do_not_fit(bundle: Path) -> None:
    result = call(bundle, "--engine", "sm68")
    assert result.exit_code == 2
    assert 'the bundle has no engine "sm68"' in result.output
    assert 'did you mean "sm86"?' in result.output
    assert "--engine excludes --onnx" in call(bundle, "--onnx", "--engine", "sm86").output
    assert call(bundle, "--record").exit_code == 2
    result = CliRunner().invoke(device, ["build", str(bundle), "--runtime", "tensorrt", "--sm", "8.7"])
    assert result.exit_code == 2
    assert "say 87 for 8.7" in result.output


def test_a_manifest_that_forgets_a_file(bundle: Path) -> None:
    found = manifest(bundle)
    del found["files"]["graphs/onnx/model.onnx"]
    write_manifest(bundle, found)
    checks = verify(opened(bundle), Wanted(artifact="onnx")).checks
    assert checks[0].found == "graphs/onnx/model.onnx is missing in the manifest"


# self-test


def flip(path: Path, name: str, bit: int) -> None:
    """Flip one bit of the middle element of a weight in an ONNX file."""
    tensor = next(t for t in onnx.load(str(path)).graph.initializer if t.name == name)
    raw, data = tensor.raw_data, bytearray(path.read_bytes())
    at = data.find(raw) + 4 * (len(raw) // 8) + bit // 8
    data[at] ^= 1 << bit % 8
    path.write_bytes(data)


def largest(path: Path) -> str:
    """The weight of the graph with the most elements, which every output goes through."""
    found = [t for t in onnx.load(str(path)).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    return str(max(found, key=lambda t: len(t.raw_data)).name)


def test_a_flipped_bit_of_a_weight_is_found(bundle: Path) -> None:
    assert call(bundle, "--selftest").exit_code == 0
    graph = bundle / "graphs" / "onnx" / "model.onnx"
    flip(graph, largest(graph), bit=12)
    result = call(bundle, "--selftest")
    assert result.exit_code == 1
    assert "golden outputs have other bytes (batch/digit, batch/parity), up to" in result.output
    values = json.loads(call(bundle, "--selftest", "--json").stdout)["checks"][0]["values"]
    assert values == {"compared": 2, "differing": ["batch/digit", "batch/parity"]}


def test_a_flipped_bit_that_no_output_shows_is_found_in_the_file(bundle: Path) -> None:
    graph = bundle / "graphs" / "onnx" / "model.onnx"
    flip(graph, largest(graph), bit=0)
    result = call(bundle, "--selftest", "--json")
    assert result.exit_code == 1
    (files,) = [check for check in json.loads(result.stdout)["checks"] if check["name"] == "files"]
    assert files["outcome"] == "FAIL"
    assert "graphs/onnx/model.onnx" in files["found"]


def test_a_graph_that_cannot_be_loaded_any_more_fails_the_self_test(bundle: Path) -> None:
    (bundle / "graphs" / "onnx" / "model.onnx").write_bytes(b"nothing")
    result = call(bundle, "--selftest")
    assert result.exit_code == 1
    assert "FAIL     selftest  ONNX Runtime refuses model.onnx" in result.output


def test_a_session_that_is_already_running(bundle: Path) -> None:
    graph = bundle / "graphs" / "onnx" / "model.onnx"

    def session() -> Callable[[Any], dict[str, Any]]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        loaded = onnxruntime.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
        names = [item.name for item in loaded.get_outputs()]
        return lambda feed: dict(zip(names, loaded.run(names, feed), strict=True))

    test = headwise.device.selftest(bundle, "onnx")
    assert test.check(session()).ok
    flip(graph, largest(graph), bit=20)
    found = test.check(session())
    assert not found.ok
    assert 0 < found.worst < 1
    test.record(session())
    assert test.check(session()).ok
    dropped = test.check(lambda feed: {"digit": np.zeros(1)})
    assert dropped.differing == ("batch/digit", "batch/parity")


def test_an_environment_without_a_fingerprint(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch)
    result = call(bundle, "--selftest")
    assert result.exit_code == 4
    assert "no fingerprint of sm86 was recorded for this runtime, version and device" in result.output
    before = (bundle / "manifest.json").read_bytes()
    result = call(bundle, "--selftest", "--record", "--rounds", 0)
    assert result.exit_code == 0, result.output
    assert "recorded the fingerprint of sm86" in result.output
    assert (bundle / "manifest.json").read_bytes() == before
    assert call(bundle, "--selftest").exit_code == 0
    sm86(monkeypatch, version="1.8")
    assert call(bundle, "--selftest").exit_code == 4


def test_nothing_is_recorded_where_verify_says_no(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch, load=engine(swapped))
    assert call(bundle, "--selftest", "--record").exit_code == 1
    assert not (bundle / "local.json").exists()


@pytest.mark.parametrize("damage", ["other", "cut", "changed"])
def test_golden_inputs_that_cannot_be_read(bundle: Path, damage: str) -> None:
    path = bundle / "golden" / "batch.npz"
    data = path.read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"other": b"PK", "cut": data[:middle], "changed": changed}[damage])
    result = call(bundle, "--selftest")
    assert result.exit_code == 2, result.output
    assert "golden/batch.npz cannot be read" in result.output


# building on the device


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A builder whose engines are the graphs."""
    jobs: list[dict[str, Any]] = []

    def run(job: dict[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        Path(job["out"]).write_bytes(Path(job["onnx"]).read_bytes())
        return {"version": "10.3", "bytes": 1, "seconds": 0.1}

    monkeypatch.setattr(builder, "_run_worker", run)
    monkeypatch.setattr(builder, "is_installed", lambda runtime: True)
    return jobs


def test_build_on_the_device(bundle: Path, worker: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, driver=Driver(sm=87), package="tensorrt", version="10.3")
    before = (bundle / "manifest.json").read_bytes()
    command = ["build", str(bundle), "--runtime", "tensorrt", "--rounds", "0"]
    for _ in range(2):
        result = CliRunner().invoke(device, command)
        assert result.exit_code == 0, result.output
    assert "built local/local-tensorrt-sm87.engine with tensorrt 10.3" in result.output
    assert "bundle: local-tensorrt-sm87\n" in result.output
    assert (worker[0]["sm"], worker[0]["module"]) == (87, "tensorrt")
    assert worker[0]["profiles"] == manifest(bundle)["sources"][0]["profiles"]
    assert (bundle / "manifest.json").read_bytes() == before
    assert [entry["name"] for entry in json.loads((bundle / "local.json").read_text())["artifacts"]] == [
        "local-tensorrt-sm87"
    ]
    found = verify(opened(bundle), Wanted(rounds=0))
    assert found.artifact == "local-tensorrt-sm87"
    assert outcomes(found.checks) == dict.fromkeys(("files", "runtime", "ports", "golden"), "PASS")
    path = bundle / "local" / "local-tensorrt-sm87.engine"
    path.write_bytes(path.read_bytes()[:-1])
    assert "the engine local/local-tensorrt-sm87.engine is truncated" in call(bundle).output


def test_what_cannot_be_built(bundle: Path, worker: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="no GPU"):
        rebuild(opened(bundle), "tensorrt")
    fake_device(monkeypatch, driver=Driver(sm=89))
    with pytest.raises(MachineError, match="NVIDIA Test is sm89, not sm87"):
        rebuild(opened(bundle), "tensorrt", 87)
    graph = bundle / "graphs" / "engine" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    with pytest.raises(BundleError, match=r"graphs/engine/model\.onnx has "):
        rebuild(opened(bundle), "tensorrt-rtx")
    found = manifest(bundle)
    write_manifest(bundle, {**found, "sources": []})
    with pytest.raises(BundleError, match="the bundle has no graph for engines"):
        rebuild(opened(bundle), "tensorrt-rtx")
    assert not worker


def test_a_bundle_that_cannot_be_written(bundle: Path, worker: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sm86(monkeypatch)
    (bundle / "local").write_text("in the way")
    result = CliRunner().invoke(device, ["build", str(bundle), "--runtime", "tensorrt-rtx"])
    assert result.exit_code == 3
    assert "cannot write" in result.output
    assert "--out" not in result.output, "there is no such option"


def test_the_bundle_itself_is_not_changed_by_reading(base: Path) -> None:
    bundle = bundled("plain", base)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    assert verify(opened(bundle), Wanted(artifact="onnx", rounds=1)).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


# the archive, in an environment that holds nothing else


DRIVER = """
import importlib.util, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
for name in ("torch", "transformers", "onnx", "pydantic", "rich", "ml_dtypes"):
    assert name not in sys.modules and importlib.util.find_spec(name) is None, name
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"numpy", "click", "onnxruntime"}))
sys.exit(code)
"""


def link(site: Path) -> None:
    """Put the packages of a device into a folder; numpy.libs is there where numpy came as a wheel."""
    for package in ("numpy", "numpy.libs", "click", "onnxruntime"):
        found = next((path for entry in sys.path if (path := Path(entry, package)).exists()), None)
        if found is not None:
            (site / package).symlink_to(found)


def bare(site: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Python without a site: of all packages it sees those in the folder only."""
    command = [sys.executable, "-S", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, check=False, env=env, cwd=site, capture_output=True, text=True)


def test_a_bare_device_needs_numpy_click_and_a_runtime(base: Path, tmp_path: Path) -> None:
    archive = copy_of("plain", base, tmp_path) / "headwise-verify.pyz"
    site = tmp_path / "site"
    site.mkdir()
    link(site)
    done = bare(site, "-c", DRIVER, archive, "verify", "--rounds", "2", "--onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "click numpy onnxruntime"
    assert 'PASS     golden    output "digit"' in done.stdout
    assert bare(site, archive, "verify", "--onnx", "--selftest").returncode == 0
    (site / "onnxruntime").unlink()
    done = bare(site, archive, "verify", "--onnx")
    assert done.returncode == 4
    assert "onnxruntime cannot be imported" in done.stdout
    for package in ("click", "numpy"):
        (site / package).unlink()
        done = bare(site, archive, "verify", "--onnx")
        assert done.returncode == 4, "1 would mean that a check said no"
        assert f"error: No module named '{package}'\n" in done.stderr
        assert f"-m pip install {package}" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_archive_builds_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    """The runtime is imported by the child, which the archive starts from itself."""
    archive = copy_of("plain", base, tmp_path) / "headwise-verify.pyz"
    link(tmp_path)
    (tmp_path / "tensorrt_rtx.py").write_text("import os; os.write(2, b'out of luck'); os.kill(os.getpid(), 9)")
    done = bare(tmp_path, archive, "build", "--runtime", "tensorrt-rtx", "--sm", "86")
    assert done.returncode == 3
    assert "the builder's process ended with signal 9: out of luck" in done.stderr


@needs_builder
def test_a_real_engine_is_built_from_the_archive(base: Path, tmp_path: Path) -> None:
    archive = copy_of("plain", base, tmp_path) / "headwise-verify.pyz"
    command = [sys.executable, archive, "build", "--runtime", "tensorrt-rtx", "--sm", "86", "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["artifact"] == "local-tensorrt-rtx-sm86"
    assert {check["name"]: check["outcome"] for check in found["checks"]}["files"] == "PASS"
    assert (archive.parent / "local" / "local-tensorrt-rtx-sm86.engine").stat().st_size > 1000
    assert done.returncode in (0, 4), "4 where there is no such GPU"


@needs_builder
def test_a_capability_that_the_builder_does_not_know(bundle: Path) -> None:
    result = CliRunner().invoke(device, ["build", str(bundle), "--runtime", "tensorrt-rtx", "--sm", "999"])
    assert result.exit_code == 3
    assert "tensorrt_rtx builds nothing for sm999" in result.output
