"""Validation errors of pydantic in the words of the recipe."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from headwise.errors import RecipeError, did_you_mean

_CORRECT = "correct the value; `headwise schema` says what each key means"
_SHAPES = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a mapping of keys to values"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list, for a single value too"),
}


def explain(
    error: ValidationError, model: type[BaseModel], prefix: tuple[str | int, ...] = (), what: str = "recipe"
) -> RecipeError:
    """One problem that pydantic found, as an error that says what to write.

    Args:
        error: of validating ``model``.
        model: where the locations of the error begin.
        prefix: where ``model`` is in the recipe.
        what: the file that was validated.
    """
    # A misspelt key is also a missing one: the misspelling says more.
    first = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    shown, models = _walk(model, first["loc"])
    where = ".".join(map(str, (*prefix, *shown))) or what
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    context, kind, given = first.get("ctx", {}), first["type"], first["input"]
    if kind == "extra_forbidden":
        known = {name for cls in _walk(model, first["loc"][:-1])[1] for name in cls.model_fields}
        key = str(first["loc"][-1])
        return RecipeError(
            f'unknown key "{where}"{more}', expected=f"one of: {', '.join(sorted(known))}", fix=did_you_mean(key, known)
        )
    if kind in ("missing", "union_tag_not_found"):
        tags = ", ".join(tag for cls in models for tag in _tags(cls)) if kind != "missing" else ""
        where += ".type" if tags else ""
        expected = f"one of: {tags}" if tags else "a value for this key"
        return RecipeError(f'"{where}" is missing{more}', expected=expected, fix=f"add it to the {what}")
    if kind in ("literal_error", "union_tag_invalid"):
        choices = re.findall("'([^']*)'", str(context.get("expected_tags") or context.get("expected")))
        where, word = (f"{where}.type", str(context["tag"])) if "tag" in context else (where, str(given))
        fix = did_you_mean(word, choices)
        return RecipeError(f'"{where}" is "{word}"{more}', expected=f"one of: {', '.join(choices)}", fix=fix)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "value_error":
        return RecipeError(f'"{where}": {message}{more}', expected="a value that fits the others", fix=_CORRECT)
    value = f"a {type(given).__name__}" if isinstance(given, dict | list | BaseModel) else repr(given)
    return RecipeError(f'"{where}" is {value}{more}', expected=_SHAPES.get(kind, message), fix=_CORRECT)


def _walk(model: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str | int], list[type[BaseModel]]]:
    """Follow a pydantic error location: its parts without the tags of unions, and the models that it ends in."""
    found: list[type[BaseModel]] = [model]
    shown: list[str | int] = []
    for part in location:
        inner = [cls for m in found if part in m.model_fields for cls in _models(m.model_fields[str(part)].annotation)]
        tagged = [cls for cls in found if part in _tags(cls)]
        if inner or not tagged:
            shown.append(part)
        found = inner or tagged or found
    return shown, found


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Values of the ``type`` field that selects a member of a discriminated union."""
    field = model.model_fields.get("type")
    return () if field is None else typing.get_args(field.annotation)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model inside a type annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]
