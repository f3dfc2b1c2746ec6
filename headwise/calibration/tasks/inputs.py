"""Columns of a table as model inputs: text through the tokenizer, images through the image processor, or arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from headwise.calibration.data import Column, Table
from headwise.calibration.tasks.examples import Array, Row
from headwise.errors import DataError, did_you_mean
from headwise.model.checkpoint import Checkpoint

Rows = tuple[list[Row], dict[str, float]]
"""Rows, and the padding value of each input."""

_IMAGES_AT_ONCE = 64


def encode_inputs(table: Table, checkpoint: Checkpoint, *, labels: Collection[str], max_length: int | None) -> Rows:
    """One row of model inputs for every row of the table.

    Args:
        table: ``text`` (and ``text_pair``), ``image``, or columns named after inputs of the model.
        checkpoint: gives tokenizer, image processor and input names.
        labels: columns that are not inputs.
        max_length: tokens per text; None takes what tokenizer and model allow.

    Raises:
        DataError: a column is none of these, or there is none.
    """
    roles = [role for role in table.columns if role not in labels]
    known = checkpoint.input_names()
    unknown = [role for role in roles if role not in ("text", "text_pair", "image", *known)]
    if unknown or not roles or roles == ["text_pair"]:
        found = (
            f'"{unknown[0]}" is not an input of the model' if unknown else "the data have no column with model inputs"
        )
        raise DataError(
            found,
            expected="text (and text_pair), image, or an input of the model: " + ", ".join(known),
            fix=(did_you_mean(unknown[0], ["text", "text_pair", "image", *known]) + "  " if unknown else "")
            + "Choose the columns with data.columns",
        )
    parts: list[Rows] = []
    if "text" in roles:
        texts, pairs = text_column(table, "text"), text_column(table, "text_pair") if "text_pair" in roles else None
        parts.append(encode_text(checkpoint, texts, pairs, max_length=max_length))
    if "image" in roles:
        parts.append(_encode_images(checkpoint, table.columns["image"]))
    parts.extend(_encode_array(role, table.columns[role]) for role in roles if role in known)
    rows = [
        {name: array for row in group for name, array in row.items()}
        for group in zip(*(p[0] for p in parts), strict=True)
    ]
    return list(rows), {name: value for part in parts for name, value in part[1].items()}


def text_column(table: Table, role: str) -> list[str]:
    """A column of text.

    Raises:
        DataError: it holds something else.
    """
    values = table.columns[role]
    if not isinstance(values, list):
        raise DataError(
            f'{table.source}: the column for "{role}" holds {values.dtype} values',
            expected="text",
            fix="map the column with the text in data.columns",
        )
    return values


def encode_text(
    checkpoint: Checkpoint, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None
) -> Rows:
    """Token ids, masks and whatever else both the tokenizer gives and the model takes, one row per text.

    Raises:
        DataError: no tokenizer, or a text without a single token.
    """
    tokenizer = checkpoint.tokenizer()
    limit = token_limit(checkpoint, tokenizer, max_length)
    encoded = tokenizer(
        list(texts), None if pairs is None else list(pairs), truncation=limit is not None, max_length=limit
    )
    names = [name for name in encoded if name in checkpoint.input_names()]
    empty = next((i for i, ids in enumerate(encoded["input_ids"]) if not ids), None)
    if empty is not None:
        raise DataError(
            f"the text in row {empty} ({texts[empty]!r}) has no tokens",
            expected="at least one token in every text",
            fix="remove empty texts from the data",
        )
    arrays = {name: [np.asarray(values, dtype=np.int64) for values in encoded[name]] for name in names}
    rows: list[Row] = [{name: arrays[name][i] for name in names} for i in range(len(texts))]
    padding = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        "attention_mask": 0,
    }
    return rows, {name: float(padding.get(name, 0)) for name in names}


def token_limit(checkpoint: Checkpoint, tokenizer: Any, asked: int | None) -> int | None:
    """The longest text in tokens: the recipe's wish, within what tokenizer and position embeddings allow.

    Raises:
        DataError: the recipe asks for more than the model has positions.
    """
    positions = checkpoint.longest_sequence()
    if asked is not None and positions is not None and asked > positions:
        raise DataError(
            f"max_length is {asked}", expected=f"at most the model's {positions} positions", fix="lower max_length"
        )
    # Tokenizers without a limit of their own say so with a number far above any real length.
    own = tokenizer.model_max_length if tokenizer.model_max_length < 1 << 30 else None
    limits = [limit for limit in (asked or own, positions) if limit is not None]
    return int(min(limits)) if limits else None


def _encode_images(checkpoint: Checkpoint, images: Column) -> Rows:
    names = checkpoint.input_names()
    name = "pixel_values" if "pixel_values" in names else names[0]
    if checkpoint.kind != "transformers" and checkpoint.processor is None:
        return [{name: row} for row in _arrays("image", images, np.float32)], {}
    processor = checkpoint.image_processor()
    channels = getattr(getattr(checkpoint.module, "config", None), "num_channels", 3)
    pictures = [np.asarray(image) for image in images]
    if channels == 3:
        pictures = [np.stack([image] * 3, axis=-1) if image.ndim == 2 else image for image in pictures]
    rows: list[Row] = []
    for start in range(0, len(pictures), _IMAGES_AT_ONCE):
        pixels = processor(pictures[start : start + _IMAGES_AT_ONCE], return_tensors="pt")["pixel_values"].numpy()
        rows.extend({name: row} for row in pixels)
    return rows, {}


def _encode_array(role: str, values: Column) -> Rows:
    # Padding masks of PyTorch are True at padding, attention masks are 1 at tokens.
    return [{role: row} for row in _arrays(role, values)], {role: 1.0 if role.endswith("padding_mask") else 0.0}


def _arrays(role: str, values: Column, dtype: type[np.generic] | None = None) -> list[Array]:
    """One array per row: bool stays, signed integers become int64, everything else float32."""
    try:
        cells = np.asarray(values, dtype=np.float32) if isinstance(values, list) else values
    except ValueError as error:
        raise DataError(
            f'the column for "{role}" holds text: {error}',
            expected="numbers, because it is an input of the model",
            fix="map a column of numbers, or name the column's role text",
        ) from error
    kind = {"b": np.bool_, "i": np.int64}
    return [np.asarray(c, dtype=dtype or kind.get(np.asarray(c).dtype.kind, np.float32)) for c in cells]
