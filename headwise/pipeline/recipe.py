"""The recipe: one YAML file that says what to compress, how to judge it and what to build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, WithJsonSchema, model_validator

from headwise.calibration.data import DataSpec
from headwise.calibration.tasks import FidelityOptions, TaskSpec
from headwise.device.runtimes import ORT
from headwise.errors import RecipeError, did_you_mean
from headwise.export.precision import ExportSpec
from headwise.export.targets import CPU, resolve_target
from headwise.gates.judge import GateSpec
from headwise.passes import STEPS
from headwise.passes.base import Pass
from headwise.passes.quantize import Quantize
from headwise.pipeline.explain import explain
from headwise.pipeline.speeds import refuse_untimed
from headwise.spec import Spec

KINDS = ("baseline", "pass", "onnx", "precision", "quantize", "engine")
"""What a stage can be."""


def engine_stage(target: str) -> str:
    """Name of the stage that builds for ``target``; also the name of a folder."""
    return CPU if is_cpu(target) else f"engine-{target}".replace("/", "-")


def is_cpu(target: str) -> bool:
    """Whether a target is the CPU, whatever its spelling."""
    return resolve_target(target).runtime == ORT


class CalibrationSpec(Spec):
    """The samples that statistics and refits are computed on. They must not be the samples of the gate."""

    data: DataSpec
    """Where they come from; of the same form as those of the task."""
    samples: int = Field(default=2048, ge=1)
    """How many samples to draw at random; all of them where there are fewer. It is their tokens that make a refit hold
    on other texts: short sentences need this many, pages of text or images fewer."""
    seed: int = 0
    """Seed of the draw."""


def _passes_schema() -> dict[str, Any]:
    options = [
        {
            "type": "object",
            "properties": {name: _inlined(cls.model_json_schema())},
            "required": [name],
            "additionalProperties": False,
        }
        for name, cls in STEPS.items()
    ]
    return {"type": "array", "items": {"anyOf": [{"enum": list(STEPS)}, *options]}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of its own as a part of another one: what it refers to is put where it refers."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            reference = node.get("$ref")
            own = definitions[reference.removeprefix("#/$defs/")] if reference else {}
            return {key: resolve(entry) for key, entry in {**own, **node}.items() if key != "$ref"}
        return [resolve(entry) for entry in node] if isinstance(node, list) else node

    inlined: dict[str, Any] = resolve(schema)
    return inlined


class Recipe(Spec):
    """Everything that decides what a run does; it is part of the report."""

    task: TaskSpec
    """What the model is for, and the labelled samples that every stage is judged on."""
    calibration: CalibrationSpec | None = None
    """Needed as soon as there is a pass."""
    passes: Annotated[tuple[SerializeAsAny[Pass | Quantize], ...], WithJsonSchema(_passes_schema())] = ()
    """What to do to the model, in this order; each item is a pass name with its options. ``quantize`` comes last."""
    gate: GateSpec = GateSpec()
    """How much accuracy may be lost."""
    export: ExportSpec = ExportSpec()
    """The ONNX graph: precision, opset and the shapes that engines are built for."""
    targets: tuple[str, ...] = ()
    """GPUs to build engines for: sm75, sm86, sm89, sm120, or a name such as rtx-3060; ``cpu`` for ONNX Runtime."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per batch wherever the model is run."""
    seed: int = 0
    """Seed of everything random in passes."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.passes and self.calibration is None:
            raise RecipeError(
                "the recipe has passes but no calibration",
                expected="samples that passes can look at, and that are not those of the task",
                fix="add calibration: {data: ...}",
            )
        if any(isinstance(pass_, Quantize) for pass_ in self.passes[:-1]):
            raise RecipeError(
                "quantize is not the last of the passes",
                expected="quantize once, after every pass that edits the model: it needs the scales of the final graph",
                fix="move it to the end of passes",
            )
        for target in self.targets:
            resolve_target(target)
        stages = self.stage_names()
        names = [name for name, _ in stages]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise RecipeError(
                f"two stages would be called {', '.join(repeated)}", expected="every target once", fix="leave one out"
            )
        known = {*KINDS, *names}
        for name in self.gate.stages:
            if name not in known:
                raise RecipeError(
                    f'gate.stages: this recipe has no stage "{name}"',
                    expected=f"a stage ({', '.join(names)}) or a kind ({', '.join(KINDS)})",
                    fix=did_you_mean(name, known),
                )
        refuse_untimed(self.gate, dict(stages))
        return self

    @property
    def edits(self) -> tuple[Pass, ...]:
        """The passes that change the model."""
        return tuple(pass_ for pass_ in self.passes if isinstance(pass_, Pass))

    @property
    def quantize(self) -> Quantize | None:
        """The pass that works on the graph."""
        return next((pass_ for pass_ in self.passes if isinstance(pass_, Quantize)), None)

    @property
    def for_tensorrt(self) -> bool:
        """Whether graphs for TensorRT are wanted: for a GPU, or for nobody in particular."""
        return not self.targets or not all(map(is_cpu, self.targets))

    def stage_names(self) -> list[tuple[str, str]]:
        """(name, kind) of every stage of a run, in order. A pass that occurs again is numbered."""
        names = [("baseline", "baseline")]
        for index, pass_ in enumerate(self.edits):
            earlier = sum(other.name == pass_.name for other in self.edits[:index])
            names.append((pass_.name + (f"-{earlier + 1}" if earlier else ""), "pass"))
        names.append(("onnx", "onnx"))
        if self.for_tensorrt and self.export.precision != "fp32":
            names.append((self.export.precision, "precision"))
        if self.for_tensorrt and self.quantize is not None:
            names.append((self.quantize.name, "quantize"))
        return names + [(engine_stage(target), "engine") for target in self.targets]

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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f'--set "{assignment}": the value is not valid YAML',
            expected="a number, a word, [a, list] or {a: mapping}",
            fix="close brackets and quotes, and put the whole assignment in quotes for the shell",
        ) from error
    node: Any = values
    for depth, key in enumerate(keys[:-1]):
        node = _descend(node, key, ".".join(keys[: depth + 1]))
        # passes.0.ratio stands for passes.0.prune-heads.ratio.
        if keys[0] == "passes" and depth == 1 and isinstance(node, dict) and len(node) == 1 and keys[2] not in node:
            node = _descend(node, next(iter(node)), path)
    if isinstance(node, dict):
        node[keys[-1]] = value
    else:
        _descend(node, keys[-1], path)
        node[int(keys[-1])] = value


def _descend(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise RecipeError(
                f'--set: "{path}" does not exist',
                expected=f"an index from 0 to {len(node) - 1}" if node else "an item, but the list is empty",
                fix="count the items from 0; set the whole list to make it longer",
            )
        if isinstance(node[int(key)], str):
            node[int(key)] = {node[int(key)]: {}}
        return node[int(key)]
    if not isinstance(node, dict):
        raise RecipeError(
            f'--set: "{path}" reaches into the single value {node!r}',
            expected="a key of a mapping",
            fix="shorten the path",
        )
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the paths of the recipe absolute; ``~`` is the home folder. A processor may also be a hub id."""
    task = values.get("task")
    if isinstance(task, dict) and isinstance(task.get("processor"), str):
        processor = folder / Path(task["processor"]).expanduser()
        task["processor"] = str(processor) if processor.exists() else task["processor"]
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
            f'"passes" is {items!r}', expected="a list of passes", fix="write `- prune-heads: {ratio: 0.5}`"
        )
    passes = [_make_pass(item, index) for index, item in enumerate(items)]
    task = values.get("task")
    if isinstance(task, dict) and "type" not in task:
        foreign = sorted(set(map(str, task)) - set(FidelityOptions.model_fields))
        if foreign:
            raise RecipeError(
                f'"task" has no type; without one it is fidelity, which has no key "{foreign[0]}"',
                expected="a type that has it, or one of: " + ", ".join(sorted(FidelityOptions.model_fields)),
                fix="add type to task; `headwise schema` lists the types and their keys",
            )
        values = {**values, "task": {"type": "fidelity", **task}}
    try:
        return Recipe.model_validate({**values, "passes": passes})
    except ValidationError as error:
        raise explain(error, Recipe) from error


def _make_pass(item: Any, index: int) -> Pass | Quantize:
    named = {item: {}} if isinstance(item, str) else item
    if not isinstance(named, dict) or len(named) != 1:
        raise RecipeError(
            f'"passes.{index}" is {item!r}',
            expected="one pass name with its options",
            fix="write `- prune-heads: {ratio: 0.5}`",
        )
    name, options = next(iter(named.items()))
    if name not in STEPS:
        raise RecipeError(
            f'passes.{index}: no pass is called "{name}"',
            expected="one of: " + ", ".join(STEPS),
            fix=did_you_mean(str(name), STEPS) + "  `headwise passes` lists them",
        )
    try:
        return STEPS[name].model_validate(options or {})
    except ValidationError as error:
        raise explain(error, STEPS[name], ("passes", index, name)) from error
