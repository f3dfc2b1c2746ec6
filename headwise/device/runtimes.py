"""The runtimes by name, and the packages that they are."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from headwise.errors import MissingDependencyError

RTX, FULL = "tensorrt-rtx", "tensorrt"
RUNTIMES = (RTX, FULL)
"""Runtimes of engines."""
ORT = "onnxruntime"

MODULES = {RTX: "tensorrt_rtx", FULL: "tensorrt", ORT: "onnxruntime"}


def load_runtime(runtime: str) -> ModuleType:
    """The package of a runtime.

    Raises:
        MissingDependencyError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise missing(runtime, str(error)) from error


def is_installed(runtime: str) -> bool:
    """Whether the package of a runtime is there; its libraries are not loaded."""
    return importlib.util.find_spec(MODULES[runtime]) is not None


def missing(runtime: str, reason: str) -> MissingDependencyError:
    """The error of a runtime that is not to be had."""
    return MissingDependencyError(
        f"{MODULES[runtime]} cannot be imported: {reason}",
        expected=f"the package of the runtime {runtime}",
        fix=f"pip install {MODULES[runtime]}",
    )
