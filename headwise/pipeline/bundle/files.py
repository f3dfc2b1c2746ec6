"""The files of a bundle that are no models: the processor, and ``headwise-verify.pyz``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipapp
from pathlib import Path

from headwise.pipeline.companions import pass_on

_LEAFS = ("__init__.py", "errors.py", "artifacts.py")
_MAIN = """\
import sys

try:
    import numpy

    from headwise.device.cli import main
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: {error}\\n"
        "  expected: Python with numpy and click, and the runtime of the artifact\\n"
        f"  do this:  {sys.executable} -m pip install {error.name}\\n"
    )
    sys.exit(4)

main()
"""
"""What the archive runs; without numpy or click, Python itself would end with 1, which means that a check said no."""
_TIME = 315_619_200  # 1980-01-02: zip files know no earlier one


def copy_processor(graph: Path, folder: Path) -> None:
    """Copy tokenizer and image processor, and the configuration that says what the outputs mean.

    Args:
        graph: folder of a graph of the run, which has them where the model does.
        folder: made where there is something to copy.
    """
    pass_on(graph, folder)
    for path in folder.glob("*.json"):
        _forget_place(path)


def _forget_place(path: Path) -> None:
    """transformers writes down where it read a file from."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(found, dict) and found.keys() & {"name_or_path", "_name_or_path"}:
        kept = {key: value for key, value in found.items() if key not in ("name_or_path", "_name_or_path")}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_archive(path: Path) -> None:
    """Write ``headwise-verify.pyz``: the folder ``device`` with the modules that it needs, equal bytes every time."""
    package = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for file in [*(package / name for name in _LEAFS), *sorted((package / "device").glob("*.py"))]:
            target = root / file.relative_to(package.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        main = root / "__main__.py"
        main.write_text(_MAIN)
        for entry in root.rglob("*"):
            os.utime(entry, (_TIME, _TIME))
        zipapp.create_archive(root, path, interpreter="/usr/bin/env python3")
