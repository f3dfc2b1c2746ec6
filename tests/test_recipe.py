"""The recipe: defaults, overrides, paths, and an error text for every way to get it wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from headwise.calibration.tasks import FidelityOptions
from headwise.cli import main
from headwise.errors import DataError, HeadwiseError, RecipeError, TargetError
from headwise.passes import PASSES, STEPS
from headwise.pipeline.recipe import Recipe, load_recipe
from headwise.pipeline.run import compress

ROOT = Path(__file__).parents[1]
DATA = {"path": "test.npz"}
FULL: dict[str, Any] = {
    "task": {"type": "sentence-similarity", "metric": "spearman", "data": DATA},
    "calibration": {"data": {"path": "calibration.npz"}, "samples": 40},
    "passes": [{"prune-heads": {"ratio": 0.5}}],
    "gate": {"max_drop": 2.0, "stages": {"prune-heads": {"max_drop": 3.0}}, "outputs": {"embedding": {"max_drop": 1}}},
    "export": {"precision": "fp16", "batch": {"min": 1, "opt": 2, "max": 4}},
    "targets": ["sm86"],
}
MULTI = {
    "type": "multi-output",
    "data": DATA,
    "outputs": {"digit": {"type": "classification", "metric": "accuracy"}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """FULL with one value replaced; a part of the path that is a number is an index."""
    recipe = json.loads(json.dumps(FULL))
    *parents, last = path.split("/")
    node = recipe
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value
    return dict(recipe)


def message(recipe: Mapping[str, Any], *overrides: str, kind: type[HeadwiseError] = RecipeError) -> str:
    with pytest.raises(kind) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_default() -> None:
    recipe = load_recipe({"task": {"data": {"path": "/data/x.npz"}}}).to_json()
    assert recipe == {
        "task": {
            "type": "fidelity",
            "data": {
                "path": "/data/x.npz",
                **dict.fromkeys(("hub", "subset", "split", "format", "delimiter", "quoting", "labels", "separator")),
                "columns": {},
                "header": True,
                "encoding": "utf-8-sig",
                "pattern": None,
                "limit": None,
            },
            **dict.fromkeys(("outputs", "classes", "max_length", "processor")),
        },
        "calibration": None,
        "passes": [],
        "gate": {
            "max_drop": 1.0,
            "confidence": 0.95,
            "on_fail": "stop",
            "max_gain": None,
            "min_samples": 30,
            "resamples": 1000,
            "seed": 0,
            "min_speedup": None,
            "outputs": {},
            "metrics": {},
            "stages": {},
        },
        "export": {
            "precision": "fp16",
            "opset": 23,
            "clusters": "auto",
            "cache": "auto",
            "decode": "auto",
            "batch": {"min": 1, "opt": 1, "max": 8},
            "sequence": None,
            "keep_io": False,
            "context": None,
            "workspace_mb": None,
        },
        "targets": [],
        "batch_size": 32,
        "seed": 0,
    }


def test_the_recipes_of_the_repository_are_valid() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        recipe = load_recipe(path)
        assert recipe.passes
        assert Path(recipe.task.data.path).parent == path.parent


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "passes").glob("*.md")), ids=lambda page: page.stem)
def test_the_page_of_a_pass_names_every_option(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name in STEPS[page.stem].model_fields if f"`{name}`" not in text]
    assert not missing


def test_defaults_of_calibration_and_passes() -> None:
    recipe = load_recipe(
        {
            "task": {"data": DATA},
            "calibration": {"data": {"path": "c.npz"}},
            "passes": [{"prune-heads": {"ratio": 0.5}}],
        }
    ).to_json()
    assert (recipe["calibration"]["samples"], recipe["calibration"]["seed"]) == (2048, 0)
    assert recipe["passes"] == [
        {
            "prune-heads": {
                "ratio": 0.5,
                "score": "contribution",
                "scope": "model",
                "normalize": False,
                "min_heads": 1,
                "round_to": 1,
                "fold_mean": True,
                "refit": True,
                "ridge": 1.0,
                "reconstruct": 0,
                "seed": 0,
            }
        }
    ]


@pytest.mark.parametrize(
    ("path", "value", "key", "suggestion"),
    [
        ("taks", {}, "taks", "task"),
        ("task/metrc", "spearman", "task.metrc", "metric"),
        ("task/data/delimeter", ",", "task.data.delimeter", "delimiter"),
        ("calibration/sample", 4, "calibration.sample", "samples"),
        ("calibration/data/colums", {}, "calibration.data.colums", "columns"),
        ("gate/max_dorp", 1, "gate.max_dorp", "max_drop"),
        ("gate/stages/prune-heads/max_dorp", 1, "gate.stages.prune-heads.max_dorp", "max_drop"),
        ("gate/outputs/embedding/max_dorp", 1, "gate.outputs.embedding.max_dorp", "max_drop"),
        ("export/precison", "fp16", "export.precison", "precision"),
        ("export/batch/opr", 2, "export.batch.opr", "opt"),
        ("passes/0/prune-heads/ratoi", 0.5, "passes.0.prune-heads.ratoi", "ratio"),
        ("passes", [{"prune-heads": {"ratoi": 0.5}}], "passes.0.prune-heads.ratoi", "ratio"),
        (
            "task",
            {**MULTI, "outputs": {"digit": {"type": "classification", "metrc": "f1"}}},
            "task.outputs.digit.metrc",
            "metric",
        ),
    ],
)
def test_unknown_keys_are_named_with_a_suggestion(path: str, value: Any, key: str, suggestion: str) -> None:
    text = message(changed(path, value))
    assert f'unknown key "{key}"' in text
    assert f'did you mean "{suggestion}"?' in text
    assert f"{suggestion}" in text.split("expected: one of: ")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("path", "value", "found", "suggestion"),
    [
        ("task/type", "sentence-similarit", '"task.type" is "sentence-similarit"', "sentence-similarity"),
        ("task/metric", "spearmann", 'no metric of this task is called "spearmann"', "spearman"),
        ("passes", [{"prune-head": {}}], 'no pass is called "prune-head"', "prune-heads"),
        ("passes/0/prune-heads/score", "contributon", 'score" is "contributon"', "contribution"),
        ("gate/on_fail", "rolback", '"gate.on_fail" is "rolback"', "rollback"),
        ("gate/stages", {"prune-head": {}}, 'this recipe has no stage "prune-head"', "prune-heads"),
        ("gate/stages", {"engine-sm89": {}}, 'this recipe has no stage "engine-sm89"', "engine-sm86"),
        ("export/precision", "fp61", '"export.precision" is "fp61"', "fp16"),
        (
            "task",
            {**MULTI, "outputs": {"digit": {"type": "clasification"}}},
            '"task.outputs.digit.type" is "clasification"',
            "classification",
        ),
    ],
)
def test_unknown_names_have_a_suggestion(path: str, value: Any, found: str, suggestion: str) -> None:
    text = message(changed(path, value))
    assert found in text
    assert f'did you mean "{suggestion}"?' in text


def test_an_unknown_target_has_a_suggestion() -> None:
    text = message(changed("targets", ["rtx3060"]), kind=TargetError)
    assert 'unknown target "rtx3060"' in text
    assert 'did you mean "rtx-3060"?' in text


@pytest.mark.parametrize(
    ("path", "value", "found", "expected"),
    [
        ("task", None, '"task" is None', "a mapping of keys to values"),
        ("task", "x", "\"task\" is 'x'", "a mapping of keys to values"),
        ("gate/max_drop", "much", "\"gate.max_drop\" is 'much'", "a valid number"),
        ("gate/max_drop", -1, '"gate.max_drop" is -1', "greater than or equal to 0"),
        ("targets", "sm86", "\"targets\" is 'sm86'", "a list, for a single value too"),
        ("targets", ["sm86", "sm86"], "two stages would be called engine-sm86", "every target once"),
        ("batch_size", 0, '"batch_size" is 0', "greater than or equal to 1"),
        ("seed", {}, '"seed" is a dict', "a valid integer"),
        ("passes", "prune-heads", "\"passes\" is 'prune-heads'", "a list of passes"),
        ("passes", [3], '"passes.0" is 3', "one pass name with its options"),
        ("passes", [{"prune-heads": {}, "b": {}}], '"passes.0" is {', "one pass name with its options"),
        ("passes", [{"prune-heads": 3}], '"passes.0.prune-heads" is 3', "a mapping of keys to values"),
        ("passes", ["prune-heads"], '"passes.0.prune-heads.ratio" is missing', "a value for this key"),
        ("passes/0/prune-heads/ratio", 1, '"passes.0.prune-heads.ratio" is 1', "less than 1"),
        ("task/data", {}, '"task.data": give either path', "a value that fits the others"),
        ("calibration", None, "the recipe has passes but no calibration", "samples that passes can look at"),
        ("task", {"data": DATA, "metric": "f1"}, '"task" has no type; without one it is fidelity', "a type"),
        ("task", {**MULTI, "outputs": {"d": {}}}, '"task.outputs.d.type" is missing', "one of: classification"),
    ],
)
def test_wrong_values_say_what_is_expected(path: str, value: Any, found: str, expected: str) -> None:
    text = message(changed(path, value))
    assert found in text.split("\n")[0]
    assert f"expected: {expected}" in text
    assert "do this:" in text


def test_missing_keys() -> None:
    text = message({})
    assert '"task" is missing' in text
    text = message({"task": {"type": "classification"}})
    assert '"task.data" is missing' in text


def test_several_problems_are_counted() -> None:
    assert 'unknown key "gate.a" (and 1 more)' in message({**FULL, "gate": {"a": 1, "b": 2}})


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("passes.0.ratio=0.25", ("passes", 0, "prune-heads", "ratio"), 0.25),
        ("passes.0.prune-heads.ratio=0.25", ("passes", 0, "prune-heads", "ratio"), 0.25),
        ("passes.0.score=gauss-newton", ("passes", 0, "prune-heads", "score"), "gauss-newton"),
        ("gate.stages.onnx.max_drop=0.5", ("gate", "stages", "onnx", "max_drop"), 0.5),
        ("gate={max_drop: 4}", ("gate", "max_drop"), 4.0),
        ("export.sequence={min: 1, opt: 4, max: 8}", ("export", "sequence", "opt"), 4),
        ("targets.0=l4", ("targets", 0), "l4"),
        ("targets=[sm89, sm120]", ("targets", 1), "sm120"),
        ("seed=3", ("seed",), 3),
        ("task.data.columns.first=5", ("task", "data", "columns", "first"), 5),
        ("task.data.delimiter='='", ("task", "data", "delimiter"), "="),
    ],
)
def test_set_reaches_every_place(override: str, where: tuple[str | int, ...], value: Any) -> None:
    found: Any = load_recipe({**FULL, "gate": {}}, [override]).to_json()
    for key in where:
        found = found[key]
    assert found == value


def test_set_reaches_a_pass_that_is_only_a_name() -> None:
    recipe = load_recipe({**FULL, "passes": ["prune-heads"], "gate": {}}, ["passes.0.ratio=0.25"])
    assert recipe.to_json()["passes"][0]["prune-heads"]["ratio"] == 0.25


def test_set_does_not_change_the_given_mapping() -> None:
    given = json.loads(json.dumps(FULL))
    load_recipe(given, ["passes.0.ratio=0.25", "targets.0=sm89", "gate.outputs.x.max_drop=1"])
    assert given == FULL


@pytest.mark.parametrize(
    ("override", "found", "expected"),
    [
        ("ratio", '--set "ratio"', "key.path=value"),
        ("=3", '--set "=3"', "key.path=value"),
        ("gate..x=1", '--set "gate..x=1"', "key.path=value"),
        ("passes.1.ratio=1", '"passes.1" does not exist', "an index from 0 to 0"),
        ("passes.prune-heads.ratio=1", '"passes.prune-heads" does not exist', "an index from 0 to 0"),
        ("targets.7=sm86", '"targets.7" does not exist', "an index from 0 to 0"),
        ("passes.0.ratio.x=1", "reaches into the single value 0.5", "a key of a mapping"),
        ("export.precision.x.y=1", "reaches into the single value 'fp16'", "a key of a mapping"),
        ("gate.max_drop=[1", "the value is not valid YAML", "a number, a word"),
        ("gaet.max_drop=1", 'unknown key "gaet"', "one of: "),
    ],
)
def test_set_that_goes_nowhere(override: str, found: str, expected: str) -> None:
    text = message(FULL, override)
    assert found in text
    assert f"expected: {expected}" in text


def test_set_into_an_empty_list() -> None:
    assert "an item, but the list is empty" in message({**FULL, "passes": []}, "passes.0.ratio=1")


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tmp_path / "recipes", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    recipe = {**FULL, "calibration": {"data": {"path": str(other / "c.npz")}}}
    recipe["task"] = {"type": "fidelity", "data": {"path": "images.idx", "labels": "../labels.idx"}}
    recipe["gate"] = {}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(other)
    loaded = load_recipe(Path("../recipes/r.yaml"))
    assert loaded.calibration is not None
    assert loaded.task.data.path == str(folder / "images.idx")
    assert Path(str(loaded.task.data.labels)).resolve() == tmp_path / "labels.idx"
    assert loaded.calibration.data.path == str(other / "c.npz")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(folder / "r.yaml", ["task.data.path=~/x.npz"]).task.data.path == str(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("task: [", "is not valid YAML"),
        ("- a\n- b", "holds list"),
        ("", "holds NoneType"),
        ("\xff".encode("latin-1"), "is not valid YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str | bytes | None, found: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RecipeError, match=found) as caught:
        load_recipe(path)
    assert "r.yaml" in caught.value.found


def test_stage_names_number_what_occurs_twice() -> None:
    prune = {"prune-heads": {"ratio": 0.2}}
    recipe = load_recipe(
        {**FULL, "passes": [prune, prune, prune], "targets": ["sm86", "tensorrt/a100"], "gate": {}},
        ["gate.stages.prune-heads-2.on_fail=rollback"],
    )
    assert [name for name, _ in recipe.stage_names()] == [
        *("baseline", "prune-heads", "prune-heads-2", "prune-heads-3"),
        *("onnx", "fp16", "engine-sm86", "engine-tensorrt-a100"),
    ]
    names = load_recipe({**FULL, "export": {"precision": "fp32"}}).stage_names()
    assert "precision" not in {kind for _, kind in names}


@pytest.mark.parametrize(
    ("gate", "found", "suggestion"),
    [
        ({"outputs": {"digt": {"max_drop": 1}}}, 'the task does not judge "digt"', "digit"),
        ({"metrics": {"acuracy": {"max_drop": 1}}}, 'the task does not judge "acuracy"', "accuracy"),
    ],
)
def test_limits_for_nothing_are_refused(tmp_path: Path, gate: dict[str, Any], found: str, suggestion: str) -> None:
    with pytest.raises(RecipeError, match=found) as caught:
        compress("conftest:two_heads", {"task": MULTI, "gate": gate}, tmp_path / "out")
    assert caught.value.fix == f'did you mean "{suggestion}"?'
    with pytest.raises(DataError, match=r"test\.npz"):
        compress("conftest:two_heads", {"task": MULTI, "gate": {"metrics": {"fidelity": {}}}}, tmp_path / "out")


@pytest.mark.parametrize("recipe", [FULL, {"task": MULTI}, {"task": {"data": DATA}}])
def test_round_trip(recipe: dict[str, Any]) -> None:
    first = load_recipe(recipe, ["batch_size=7"])
    again = load_recipe(yaml.safe_load(yaml.safe_dump(first.to_json())))
    assert again == first
    assert again.to_json() == first.to_json()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(FULL).seed = 3  # type: ignore[misc]


def _nodes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, value
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from _nodes(entry, f"{path}/{key}")


def test_schema_command_documents_every_key() -> None:
    result = CliRunner().invoke(main, ["schema"])
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert schema["type"] == "object"
    assert schema["required"] == ["task"]
    assert set(schema["properties"]) == set(Recipe.model_fields)
    seen = 0
    for path, node in _nodes(schema):
        reference = node.get("$ref") if isinstance(node, dict) else None
        if isinstance(reference, str):
            assert reference.removeprefix("#/$defs/") in schema["$defs"], f"{path} points nowhere"
        if path.endswith("/properties"):
            for key, entry in node.items():
                if key not in PASSES:
                    assert entry.get("description"), f"{path}/{key} is not documented"
                    seen += 1
    assert seen > 80
    options = next(node for path, node in _nodes(schema) if path.endswith("/properties/prune-heads"))
    assert set(options["properties"]) == set(PASSES["prune-heads"].model_fields)
    assert FidelityOptions.__name__ in schema["$defs"]


def test_schema_accepts_what_recipes_accept() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema checks the schema itself")
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(load_recipe(FULL).to_json(), schema)
    jsonschema.validate({**FULL, "passes": [{"prune-heads": {"ratio": 0.5}}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**FULL, "gaet": {}}, schema)
