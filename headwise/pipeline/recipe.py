"""The recipe: one YAML file that says what to compress, how to judge it and what to build."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, WithJsonSchema, model_validator

from headwise.calibration.data import DataSpec
from headwise.calibration.tasks import TaskSpec
from headwise.errors import HeadwiseError, RecipeError, did_you_mean
from headwise.export.precision import ExportSpec
from headwise.export.targets import resolve_target
from headwise.gates.judge import GateSpec
from headwise.passes import PASSES
from headwise.passes.base import Pass
from headwise.spec import Spec


class CalibrationSpec(Spec):
    """The samples that statistics and refits are computed on. They must not be the samples of the gate."""

    data: DataSpec
    samples: int = Field(default=512, ge=1)
    """How many samples to draw at random; all of them where there are fewer."""
    seed: int = 0
    """Seed of the draw."""


def _passes_schema() -> dict[str, Any]:
    options = [
        {
            "type": "object",
            "properties": {name: cls.model_json_schema()},
            "required": [name],
            "additionalProperties": False,
        }
        for name, cls in PASSES.items()
    ]
    return {"type": "array", "items": {"anyOf": [{"enum": list(PASSES)}, *options]}}


class Recipe(Spec):
    """Everything that decides what a run does; it is part of the report."""

    task: TaskSpec
    """What the model is for, and the labelled samples that every stage is judged on."""
    calibration: CalibrationSpec | None = None
    """Needed as soon as there is a pass."""
    passes: Annotated[tuple[SerializeAsAny[Pass], ...], WithJsonSchema(_passes_schema())] = ()
    """What to do to the model, in this order; each item is a pass name with its options."""
    gate: GateSpec = GateSpec()
    """How much accuracy may be lost."""
    export: ExportSpec = ExportSpec()
    """The ONNX graph: precision, opset and the shapes that engines are built for."""
    targets: tuple[str, ...] = ()
    """GPUs to build engines for: sm75, sm86, sm89, sm120, or a name such as rtx-3060."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per batch wherever the model is run."""
    seed: int = 0
    """Seed of everything random in passes."""

    @model_validator(mode="after")
    def _calibrated(self) -> Recipe:
        if self.passes and self.calibration is None:
            raise ValueError("passes need samples to look at: add calibration: {data: ..., samples: 512}")
        for target in self.targets:
            resolve_target(target)
        return self

    def to_json(self) -> dict[str, Any]:
        """The recipe with every default filled in, in the form that YAML has it."""
        plain = self.model_dump(mode="json", exclude={"passes"})
        return {**plain, "passes": [{pass_.name: pass_.model_dump(mode="json")} for pass_ in self.passes]}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: a YAML file, or the same content as a mapping. Paths of data are relative to the file's folder.
        overrides: ``key.path=value`` assignments, with values in YAML; ``passes.0.ratio=0.25`` reaches the first pass.

    Raises:
        RecipeError: with the key, what is wrong with it, and a suggestion for misspelt ones.
    """
    folder = Path.cwd()
    if isinstance(source, Mapping):
        values = _plain(source)
    else:
        path = Path(source)
        folder = path.resolve().parent
        values = _read(path)
    for assignment in overrides:
        _override(values, assignment)
    _resolve_paths(values, folder)
    return _validate(values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}",
            expected="a YAML file",
            fix="check the path; `headwise demo` writes a recipe that you can copy",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} is not valid YAML: {str(error).replace(chr(10), ' ')}",
            expected="a YAML mapping with task, calibration, passes, gate, export, targets",
            fix="correct the line that is named",
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path} holds {type(values).__name__}",
            expected="a YAML mapping with task, calibration, passes, gate, export, targets",
            fix="start from the recipe that `headwise demo` writes",
        )
    return values


def _plain(value: Any) -> Any:
    """A deep copy made of dicts and lists, so that overrides never reach the caller's object."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _override(values: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f'--set "{assignment}"', expected="key.path=value", fix="for example --set passes.0.ratio=0.25"
        )
    node: Any = values
    for depth, key in enumerate(keys[:-1]):
        node = _descend(node, key, ".".join(keys[: depth + 1]))
        if isinstance(node, dict) and len(node) == 1 and keys[0] == "passes" and depth == 1:
            (name, options) = next(iter(node.items()))
            if keys[2] != name:
                node[name] = options if options is not None else {}
                node = node[name]
    if isinstance(node, list):
        _descend(node, keys[-1], path)
        node[int(keys[-1])] = yaml.safe_load(text)
    else:
        node[keys[-1]] = yaml.safe_load(text)


def _descend(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise RecipeError(
                f'--set: "{path}" does not exist', expected=f"an index from 0 to {len(node) - 1}", fix="count from 0"
            )
        if isinstance(node[int(key)], str):
            node[int(key)] = {node[int(key)]: {}}
        return node[int(key)]
    if not isinstance(node, dict):
        raise RecipeError(
            f'--set: "{path}" reaches into a single value', expected="a key of a mapping", fix="shorten the path"
        )
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the data paths of the recipe absolute; ``~`` is the home folder."""
    for section in ("task", "calibration"):
        data = values.get(section)
        data = data.get("data") if isinstance(data, dict) else None
        if isinstance(data, dict):
            for key in ("path", "labels"):
                if isinstance(data.get(key), str):
                    data[key] = str(folder / Path(data[key]).expanduser())


def _validate(values: dict[str, Any]) -> Recipe:
    items = values.get("passes") or []
    if not isinstance(items, list):
        raise RecipeError(
            f"passes is {type(items).__name__}", expected="a list of passes", fix="write `- prune-heads: {ratio: 0.5}`"
        )
    passes = [_make_pass(item, index) for index, item in enumerate(items)]
    task = values.get("task")
    if isinstance(task, dict) and "type" not in task:
        values = {**values, "task": {"type": "fidelity", **task}}
    try:
        return Recipe.model_validate({**values, "passes": passes})
    except ValidationError as error:
        raise _explain(error, Recipe, ()) from error


def _make_pass(item: Any, index: int) -> Pass:
    named = {item: {}} if isinstance(item, str) else item
    if not isinstance(named, dict) or len(named) != 1:
        raise RecipeError(
            f"passes.{index} is {item!r}",
            expected="one pass name with its options",
            fix="write `- prune-heads: {ratio: 0.5}`",
        )
    name, options = next(iter(named.items()))
    if name not in PASSES:
        raise RecipeError(
            f'passes.{index}: no pass is called "{name}"',
            expected="one of: " + ", ".join(PASSES),
            fix=did_you_mean(str(name), PASSES) + "  `headwise passes` lists them",
        )
    try:
        return PASSES[name].model_validate(options or {})
    except ValidationError as error:
        raise _explain(error, PASSES[name], ("passes", index, name)) from error


def _explain(error: ValidationError, model: type[BaseModel], prefix: tuple[str | int, ...]) -> HeadwiseError:
    """The first problem that pydantic found, in the words of the recipe."""
    first = error.errors(include_url=False)[0]
    location = tuple(first["loc"])
    where = ".".join(str(part) for part in (*prefix, *location)) or "recipe"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, HeadwiseError):
        return cause
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return RecipeError(
            f'unknown key "{where}"{more}',
            expected="one of: " + ", ".join(sorted(known)),
            fix=did_you_mean(str(location[-1]), known),
        )
    if first["type"] == "missing":
        return RecipeError(f'"{where}" is missing{more}', expected="this key", fix="add it to the recipe")
    given = "" if isinstance(first["input"], dict | list | BaseModel) else f" (it is {first['input']!r})"
    return RecipeError(
        f'"{where}": {first["msg"]}{given}{more}',
        expected="a value that `headwise schema` allows",
        fix="correct the value; the schema says what each key means",
    )


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    """Names of the fields of the model that a pydantic error location points into."""
    found: list[type[BaseModel]] = [model]
    for part in location:
        inner = [cls for m in found if part in m.model_fields for cls in _models(m.model_fields[str(part)].annotation)]
        tagged = [cls for cls in found if part in _tags(cls)]
        found = inner or tagged or found
    return {name for cls in found for name in cls.model_fields}


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Values of the ``type`` field that selects a member of a discriminated union."""
    field = model.model_fields.get("type")
    return () if field is None else typing.get_args(field.annotation)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model inside a type annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]
