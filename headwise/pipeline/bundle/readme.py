"""The README of a bundle, for the person at the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import jinja2


def readme(manifest: Mapping[str, Any]) -> str:
    """Markdown with what is in the bundle, and the commands to verify it and to build its engine again."""
    return _template().render(
        manifest=manifest,
        rows=list(_rows(manifest["evidence"]["stages"])),
        trtexec=[trtexec(source) for source in manifest["sources"]],
        missing=_not_built(manifest),
    )


def trtexec(source: Mapping[str, Any]) -> str:
    """The command of full TensorRT that builds the same engine."""
    parts = [
        f"trtexec --onnx={source['file']}",
        "--stronglyTyped",
        f"--saveEngine={PurePosixPath(source['file']).stem}.engine",
    ]
    if source["workspace_mb"] is not None:
        parts.append(f"--memPoolSize=workspace:{source['workspace_mb']}M")
    for index, profile in enumerate(source["profiles"]):
        parts += [f"--profile={index}"] if len(source["profiles"]) > 1 else []
        for kind in ("min", "opt", "max"):
            shapes = ",".join(f"{name}:{'x'.join(map(str, shape[kind]))}" for name, shape in profile.items())
            parts.append(f"--{kind}Shapes={shapes}")
    return " \\\n  ".join(parts)


def _rows(stages: Sequence[Mapping[str, Any]]) -> Any:
    """One row per judged output of every stage."""
    for stage in stages:
        verdicts = {(v["output"], v["metric"]): v["outcome"] for v in stage["verdicts"]}
        for metric in stage["metrics"]:
            if metric["judged"]:
                verdict = verdicts.get((metric["output"], metric["metric"]), "")
                yield {**metric, "stage": stage["name"], "verdict": verdict, "where": stage["measured_on"]}


def _not_built(manifest: Mapping[str, Any]) -> list[str]:
    built = {artifact["name"] for artifact in manifest["artifacts"]}
    return [target for target in manifest["targets"] if target.replace("/", "-") not in built]


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("headwise.pipeline.bundle")
    # Markdown, not HTML: names are those of the model's own outputs.
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.get_template("readme.md")
