"""Starts the process of a thing that is timed, and asks it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import Any, Self

from headwise.errors import HeadwiseError

_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SECONDS_TO_END = 5
_CLASSES: dict[str, type[HeadwiseError]] = {cls.__name__: cls for cls in HeadwiseError.__subclasses__()}


class Child:
    """One variant in a process of its own; it sleeps between two questions.

    Attributes:
        label: as the user named it.
        about: what the child answers to ``load``.

    Raises:
        HeadwiseError: the variant cannot be loaded, of the class that the child met.
    """

    def __init__(self, label: str, artifact: str, threads: int, provider: str) -> None:
        self.label = label
        spec = json.dumps({"artifact": artifact, "threads": threads, "provider": provider})
        # Threads that wait actively would take the time of whoever is asked next.
        env = {**os.environ, **dict.fromkeys(_POOLS, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headwise.pipeline.bench.child", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
        try:
            self.about = self.ask("load")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Give an order and wait for its answer.

        Raises:
            HeadwiseError: it failed, or the process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "opened above"
        assert stdout is not None, "opened above"
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"do": do, **more}) + "\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            raise HeadwiseError(
                f"the process of {self.label} ended with {self._process.wait()} at the order to {do}",
                expected="an answer",
                fix="see what it printed above; -9 is most often a lack of memory: lower --batch or --seq",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            name, found, expected, fix = answer["error"]
            if name is None:
                raise HeadwiseError(
                    f"{self.label}: {found}",
                    expected="a model that runs on these inputs",
                    fix="see the lines above; --seq has to be a length that all models take",
                )
            raise _CLASSES.get(name, HeadwiseError)(f"{self.label}: {found}", expected=expected, fix=fix)
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None, "opened above"
                pipe.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
