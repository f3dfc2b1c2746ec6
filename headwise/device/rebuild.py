"""Builds an engine on the device, from the graph of the bundle."""

from __future__ import annotations

from dataclasses import replace

from headwise.artifacts import digest_file, storage_error
from headwise.device.builder import Build, build
from headwise.device.bundle import SINGLE, Artifact, Bundle
from headwise.device.checks import FAIL, check_files
from headwise.device.cuda import require_gpu
from headwise.errors import BundleError


def rebuild(bundle: Bundle, runtime: str, sm: int | None = None) -> list[Artifact]:
    """Build the engine with the profiles of the manifest, and write it down in ``local.json``.

    Where single tokens have a graph of their own, it becomes a second engine.

    Args:
        bundle: with a graph for engines.
        runtime: ``tensorrt``, or ``tensorrt-rtx``.
        sm: compute capability; None takes that of the GPU that is here.

    Raises:
        BundleError: the bundle has no graph for engines, or it is damaged.
        MachineError: no GPU, or not the one that ``tensorrt`` builds for.
        MissingDependencyError: the runtime is not installed.
        EngineError: the builder refused the graph.
        StorageError: the engine cannot be written.
    """
    if not bundle.sources:
        raise BundleError(
            "the bundle has no graph for engines",
            expected="a bundle of a run with a GPU among its targets",
            fix="add the target to the recipe, run headwise compress again, and bundle that run",
        )
    files = [file for source in bundle.sources for file in source.files]
    damaged = [check for check in check_files(bundle, files) if check.outcome == FAIL]
    if damaged:
        raise BundleError(damaged[0].found, expected=damaged[0].expected, fix=damaged[0].fix)
    sm = require_gpu().sm if sm is None else sm
    return [_build(bundle, source, runtime, sm) for source in bundle.sources]


def _build(bundle: Bundle, source: Artifact, runtime: str, sm: int) -> Artifact:
    name = f"local-{runtime}-sm{sm}" + (SINGLE if source.single else "")
    out = bundle.folder / "local" / f"{name}.engine"
    try:
        out.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(error, out.parent) from error
    made = build(
        Build(
            graph=bundle.folder / source.file,
            out=out,
            target=f"sm{sm}",
            sm=sm,
            runtime=runtime,
            profiles=source.profiles,
            workspace_mb=source.workspace_mb,
        )
    )
    file = out.relative_to(bundle.folder).as_posix()
    engine = replace(
        source, name=name, file=file, files=(file,), runtime=runtime, version=str(made["version"]), sm=sm, stage=""
    )
    bundle.local["files"][file] = {"sha256": digest_file(out), "bytes": out.stat().st_size}
    kept = [entry for entry in bundle.local["artifacts"] if entry["name"] != name]
    bundle.local["artifacts"] = [*kept, engine.to_json()]
    bundle.local["fingerprints"] = [entry for entry in bundle.local["fingerprints"] if entry["artifact"] != name]
    bundle.write_local()
    return engine
