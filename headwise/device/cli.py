"""The commands that run on the device; ``headwise-verify.pyz`` is these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from headwise.device.exits import EXIT_CODES, errors_to_exit_codes
from headwise.errors import BundleError

if TYPE_CHECKING:
    from headwise.device.bundle import Bundle
    from headwise.device.verify import Verification

BUNDLE_HELP = "BUNDLE is a folder that headwise bundle wrote; headwise-verify.pyz takes the one that it lies in."
_COLOURS = {"PASS": "green", "FAIL": "red", "NOT RUN": "yellow"}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
def main() -> None:
    """Verify and rebuild a bundle of headwise on the device that it is for."""


@main.command(epilog=BUNDLE_HELP + "\n" + EXIT_CODES)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--engine", help="Verify this engine, and nothing in its place.")
@click.option("--onnx", is_flag=True, help="Verify the graph on ONNX Runtime.")
@click.option(
    "--selftest",
    "is_selftest",
    is_flag=True,
    help="Compare the bytes of outputs with a fingerprint, and files with their hashes.",
)
@click.option("--record", is_flag=True, help="With --selftest: take the fingerprint here, after a passing verify.")
@click.option("--rounds", type=click.IntRange(min=0), default=50, show_default=True, help="Calls to measure; 0: none.")
@click.option("--tolerance", type=click.FloatRange(min=0), help="Of all outputs, in the place of the manifest's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@errors_to_exit_codes
def verify(
    bundle: Path | None,
    engine: str | None,
    onnx: bool,
    is_selftest: bool,
    record: bool,
    rounds: int,
    tolerance: float | None,
    as_json: bool,
) -> int:
    """Check a bundle on this machine.

    Files, runtime, device, inputs and outputs, golden outputs, speed and memory, one line each. Without --engine and
    --onnx every file is checked, and the engine for this GPU is run; where there is none for it, the graph on ONNX
    Runtime.
    """
    if (engine and onnx) or (record and not is_selftest):
        raise click.UsageError("--engine excludes --onnx, and --record needs --selftest")
    from headwise.device import verify as verifying
    from headwise.device.bundle import ONNX
    from headwise.device.fingerprints import compare

    opened = _open(bundle)
    wanted = verifying.Wanted(artifact=ONNX if onnx else engine, rounds=rounds, tolerance=tolerance)
    alone = is_selftest and not record
    found = compare(opened, wanted.artifact) if alone else verifying.verify(opened, wanted)
    _print(found, as_json=as_json)
    if record and found.exit_code == 0:
        _record(opened, found.artifact)
    return found.exit_code


@main.command(epilog=BUNDLE_HELP + "\n" + EXIT_CODES)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--runtime", required=True, type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="Builds the engine.")
@click.option("--sm", default="current", show_default=True, help="Compute capability without the dot, such as 87.")
@click.option("--rounds", type=click.IntRange(min=0), default=50, show_default=True, help="Calls to measure; 0: none.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@errors_to_exit_codes
def build(bundle: Path | None, runtime: str, sm: str, rounds: int, as_json: bool) -> int:
    """Build the engine for this device from the graph in the bundle, and verify it."""
    if sm != "current" and not sm.isdecimal():
        raise click.BadParameter(f'"{sm}" is no compute capability: say 87 for 8.7, or current', param_hint="--sm")
    from headwise.device.rebuild import rebuild
    from headwise.device.verify import Wanted, verify

    opened = _open(bundle)
    made = rebuild(opened, runtime, None if sm == "current" else int(sm))
    for engine in made:
        click.echo(f"built {engine.file} with {engine.runtime} {engine.version}", err=True)
    found = verify(_open(bundle), Wanted(artifact=made[0].name, rounds=rounds))
    _print(found, as_json=as_json)
    return found.exit_code


def _open(folder: Path | None) -> Bundle:
    from headwise.device.bundle import Bundle

    if folder is not None:
        return Bundle.open(folder)
    archive = Path(__file__).resolve().parents[2]
    if not archive.is_file():
        raise BundleError("no bundle was named", expected="the folder of a bundle", fix="headwise verify BUNDLE")
    return Bundle.open(archive.parent)


def _record(bundle: Bundle, name: str) -> None:
    from headwise.device.fingerprints import take

    entry = take(bundle, bundle.artifact(name))
    bundle.local["fingerprints"].append(entry)
    bundle.write_local()
    click.echo(f"recorded the fingerprint of {name} in {bundle.folder / 'local.json'}", err=True)


def _print(found: Verification, *, as_json: bool) -> None:
    """One line per check, and below it what was expected and what to do."""
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo(f"{found.bundle}: {found.artifact}" + (f" ({found.note})" if found.note else ""))
    for check in found.checks:
        click.secho(f"{check.outcome:8} {check.name:9}", nl=False, fg=_COLOURS[check.outcome])
        click.echo(f" {check.found}")
        for label, text in (("expected:", check.expected), ("do this: ", check.fix)):
            if text:
                click.echo(f"{'':18} {label} {text}")
