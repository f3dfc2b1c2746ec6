"""Builds one engine. Runs as ``python -m headwise.device.engine_worker JOB RESULT`` in a process of its own.

The builder aborts the process on some graphs, keeps the first logger it ever got, and cannot be interrupted; none of
that may reach the caller. JOB and RESULT are JSON files; a missing RESULT means that the process died.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

_MEMORY = re.compile(r"^(Total Weights Memory|Total Activation Memory|Max Scratch Memory): (\d+) bytes")
_MEMORY_KEYS = {
    "Total Weights Memory": "weights_bytes",
    "Total Activation Memory": "activation_bytes",
    "Max Scratch Memory": "scratch_bytes",
}


class BuildError(Exception):
    """The builder refused; the message is the builder's."""


class WriteError(Exception):
    """The engine cannot be written; the argument is the ``errno``."""


def _make_logger(trt: Any, log: dict[str, Any]) -> Any:
    """A logger that keeps the layer listing, the memory figures and the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                log["listing"] = message
            elif match := _MEMORY.match(message):
                log[_MEMORY_KEYS[match[1]]] = int(match[2])
            elif severity.name in ("ERROR", "INTERNAL_ERROR"):
                log.setdefault("errors", []).append(message)

    return Logger()


def _parse(trt: Any, network: Any, logger: Any, path: str) -> Any:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        problems = []
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            problems.append(f"node {error.node_name()} ({error.node_operator()}): {error.desc()}")
        raise BuildError("; ".join(problems) or "the parser gave no reason")
    return parser


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Attention without a fused kernel (fp32, a head width outside 9..256) is built from matrix multiplications.

    Where a fused kernel exists it is taken all the same.
    """
    if not hasattr(trt, "IAttentionInputLayer"):
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job["workspace_mb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_mb"] << 20)
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, f"SM{job['sm']}", None)
        if capability is None:
            raise BuildError(f"{trt.__name__} builds nothing for sm{job['sm']}")
        config.set_compute_capability(capability, 0)
    for shapes_of in filter(None, job["profiles"]):
        profile = builder.create_optimization_profile()
        for name, shapes in shapes_of.items():
            profile.set_shape(name, tuple(shapes["min"]), tuple(shapes["opt"]), tuple(shapes["max"]))
        config.add_optimization_profile(profile)
    return config


def _inspect(trt: Any, logger: Any, engine: Any) -> str | None:
    """The listing from the engine itself, for builders that do not log it. Needs the GPU that such builders need."""
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    text: str = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
    return text


def _write(out: Path, engine: Any) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(engine)
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise WriteError(error.errno) from error


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine of ``job`` and write it; what the caller wants to know about it.

    Raises:
        BuildError: the parser or the builder refused.
        WriteError: the engine cannot be written.
    """
    trt: Any = importlib.import_module(job["module"])
    log: dict[str, Any] = {}
    logger = _make_logger(trt, log)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = _parse(trt, network, logger, job["onnx"])
    _allow_decomposition(trt, network)
    config = _configure(trt, builder, job)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    del parser  # it owns the weights, so it has to live until here
    if engine is None:
        raise BuildError("; ".join(log.get("errors", [])) or "the builder gave no reason")
    _write(Path(job["out"]), engine)
    if "listing" not in log:
        log["listing"] = _inspect(trt, logger, engine)
    log.pop("errors", None)
    return {"version": trt.__version__, "seconds": seconds, "bytes": engine.nbytes, **log}


def main() -> None:
    """Read the job, build, write the result or the reason."""
    job_file, result_file = sys.argv[1:]
    try:
        result = build(json.loads(Path(job_file).read_text()))
    except BuildError as error:
        result = {"error": str(error)}
    except WriteError as error:
        result = {"errno": error.args[0]}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
