"""``headwise bundle``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from headwise.cli.common import EXIT_CODES, errors_to_exit_codes, progress


@click.command(epilog=EXIT_CODES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--triton", is_flag=True, help="Also write a model repository of Triton Inference Server.")
@click.option("--samples", type=click.IntRange(min=1), default=4, show_default=True, help="Samples in a golden input.")
@errors_to_exit_codes
def bundle(directory: Path, out: Path, triton: bool, samples: int) -> None:
    """Put what a device needs of a finished run in one folder.

    DIRECTORY is the --out of `headwise compress`; its checkpoint and its data have to be where they were. The bundle
    holds engines, graphs, the processor, golden inputs and outputs, a manifest with hashes, and headwise-verify.pyz,
    which verifies it on the device with numpy, click and the runtime alone.
    """
    with progress() as monitor:
        from headwise.pipeline.bundle.make import make_bundle

        made = make_bundle(directory, out, samples=samples, triton=triton, monitor=monitor)
    size = sum(file["bytes"] for file in made["files"].values())
    names = ", ".join(artifact["name"] for artifact in made["artifacts"])
    click.echo(f"{out}: {names}; {len(made['files'])} files, {size / 2**20:.1f} MiB")
    for name in made.get("triton", ()):
        note = (
            ""
            if (out / "triton" / name / "1" / "model.plan").exists()
            else (": the ONNX graph, because Triton loads engines of full TensorRT only, and the bundle has none")
        )
        click.echo(f"{out / 'triton' / name}{note}")
    click.echo(f"Verify it with: headwise verify {shlex.quote(str(out))}")
