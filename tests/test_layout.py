"""Layouts and plans are pure data: what they predict, refuse, and survive."""

from __future__ import annotations

import json

import pytest

from headwise.errors import PlanError
from headwise.model.edits import DropHeads, EditPlan, Scores
from headwise.model.layout import AttentionLayout, Layout, uniform

MHA = AttentionLayout(query=(0, 1, 2, 3), kv=(0, 1, 2, 3), head_dim=8)
GQA = AttentionLayout(query=(0, 1, 2, 3), kv=(0, 1), head_dim=8)


def test_units_are_single_heads_under_mha_and_kv_groups_under_gqa() -> None:
    assert MHA.units() == ((0,), (1,), (2,), (3,))
    assert GQA.units() == ((0, 1), (2, 3))


def test_heads_keep_their_original_ids_through_two_edits() -> None:
    once = MHA.without([1])
    twice = once.without([2])
    assert (once.query, once.kv) == ((0, 2, 3), (0, 2, 3))
    assert (twice.query, twice.kv) == ((0, 3), (0, 3))


def test_a_kv_head_goes_only_with_its_last_reader() -> None:
    assert GQA.without([0, 1]).kv == (1,)
    assert GQA.without([0, 2]).kv == (0, 1)
    assert GQA.without([0, 2]).group == 1


def test_kv_width_counts_keys_and_values() -> None:
    assert GQA.kv_width == 2 * 2 * 8


@pytest.mark.parametrize(
    ("layout", "edit", "message"),
    [
        (MHA, DropHeads(layer=0, query=(0, 1, 2, 3)), "would keep 0 of 4 query heads"),
        (MHA, DropHeads(layer=0, query=(7,)), "no query head 7"),
        (GQA, DropHeads(layer=0, query=(0,)), r"groups of \[1, 2\] query heads"),
        (MHA, DropHeads(layer=3, query=(0,)), "edits layer 3"),
    ],
)
def test_a_plan_that_would_break_the_model_is_refused(layout: AttentionLayout, edit: DropHeads, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        EditPlan(edits=(edit,)).check(Layout(attention=(layout,)))


def test_one_head_from_every_group_keeps_groups_equal() -> None:
    EditPlan(edits=(DropHeads(layer=0, query=(0, 2)),)).check(Layout(attention=(GQA,)))


def test_a_plan_survives_json() -> None:
    scores = Scores(name="contribution", layers=({0: 0.5, 1: 0.25, 2: 1.0, 3: 2.0},))
    plan = EditPlan(edits=(DropHeads(layer=0, query=(1,)),), scores=scores)
    assert EditPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert AttentionLayout.from_json(json.loads(json.dumps(GQA.to_json()))) == GQA


def test_uniform_compares_counts_not_ids() -> None:
    assert uniform((MHA.without([0]), MHA.without([3])))
    assert not uniform((MHA, MHA.without([3])))
