"""stream-heads as a user has it: a recipe that also quantizes matrices and caches."""

from __future__ import annotations

from pathlib import Path

from runs import STORY, run, story_files, write_recipe


def test_a_run_with_codes_in_windows(tmp_path: Path) -> None:
    folder = story_files(tmp_path / "story")
    recipe = {name: value for name, value in STORY.items() if name not in ("quantize", "passes")}
    passes = [
        {"stream-heads": {"ratio": 0.5, "sink": 1, "recent": 3, "refit": False}},
        {"quantize": {"format": "int8", "kv": "int8"}},
    ]
    write_recipe(folder, {**recipe, "passes": passes, "targets": [], "gate": {"max_drop": 100.0}})
    found = run(folder)
    stages = {stage["name"]: stage for stage in found.report["stages"]}
    assert {stages[name]["status"] for name in ("stream-heads", "onnx", "quantize")} == {"passed"}, found.reason
    # What is chosen of a window has shapes that only a run of the graph tells.
    assert stages["quantize"]["cost"]["macs"] > 0
    cost = stages["stream-heads"]["cost"]
    assert cost["kv_bytes_per_token"] < stages["baseline"]["cost"]["kv_bytes_per_token"]
    assert cost["kv_bytes_windows"] > 0
