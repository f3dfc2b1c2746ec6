"""An artifact of a bundle, ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from headwise.device.arrays import Array, Arrays, Port
from headwise.device.builder import Profiles
from headwise.device.bundle import Artifact, Bundle
from headwise.device.engine import EngineSession
from headwise.device.session import OrtSession


class Session(Protocol):
    """An engine or a graph that runs on named arrays.

    Attributes:
        inputs, outputs: name -> dtype and dims.
        device: what it runs on.
        version: of the runtime.
    """

    inputs: dict[str, Port]
    outputs: dict[str, Port]
    device: str
    version: str

    def run(self, feed: Arrays, outputs: Sequence[str] | None = None) -> dict[str, Array]: ...

    def close(self) -> None: ...


def load(bundle: Bundle, artifact: Artifact, threads: int | None = None) -> Session:
    """Open an artifact.

    Args:
        bundle: where it lies.
        artifact: one of the bundle's.
        threads: of ONNX Runtime; None lets it take every core.

    Raises:
        MachineError: no GPU, or the runtime refuses the engine on this GPU.
        MissingDependencyError: the runtime is not installed.
        ExportError: ONNX Runtime refuses the graph.
    """
    path = bundle.folder / artifact.file
    return EngineSession(path, artifact.runtime) if artifact.is_engine else OrtSession(path, threads=threads)


def run_case(session: Session, artifact: Artifact, feed: Arrays) -> dict[str, Array]:
    """The outputs of one case; an engine with shapes of its own for single tokens runs those with them."""
    if isinstance(session, EngineSession) and len(artifact.profiles) > 1 and takes(artifact.profiles[1], feed):
        return session.run(feed, profile=1)
    return session.run(feed)


def takes(profile: Profiles, feed: Arrays) -> bool:
    """Whether a set of shapes takes these inputs."""
    return all(
        low <= size <= high
        for name, shapes in profile.items()
        for low, size, high in zip(shapes["min"], feed[name].shape, shapes["max"], strict=True)
    )
