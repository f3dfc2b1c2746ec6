"""What runs on the device: numpy, click and the runtime of the artifact, and never torch, transformers or onnx.

>>> import headwise.device
>>> test = headwise.device.selftest("bundle")  # doctest: +SKIP
>>> test.check(run).ok  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwise.device.fingerprints import SelfTest


def selftest(bundle: str | Path, artifact: str | None = None) -> SelfTest:
    """The self-test of a bundle for a session that is already running, see ``SelfTest``.

    Args:
        bundle: the folder.
        artifact: name of the engine, or ``onnx``; by default what this machine can run.
    """
    from headwise.device.fingerprints import SelfTest  # the engine builder's process imports this package, but no numpy

    return SelfTest.open(Path(bundle), artifact)
