"""`headwise bench --ssh`: with a fake ssh, and with a real one to a server on this machine where there is one."""

from __future__ import annotations

import getpass
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from headwise.cli import main
from headwise.errors import DataError, HeadwiseError, MachineError, MissingDependencyError
from headwise.pipeline.bench.remote import VERIFY, Board, bench_remote, remote_table

SSHD = shutil.which("sshd") or (shutil.which("/usr/sbin/sshd") or "")
CHECKS = [{"name": "golden", "outcome": "FAIL", "found": "digit differs by 0.5"}]


def bundle(folder: Path, *, exit_code: int = 0, body: str = "") -> Path:
    """A bundle whose program says what it was told, in the form of the real one."""
    folder.mkdir()
    result = {"bundle": ".", "artifact": "onnx", "note": "", "exit_code": exit_code, "checks": CHECKS}
    program = (
        body or f"import json, sys\nprint(json.dumps({result!r} | {{'argv': sys.argv[1:]}}))\nsys.exit({exit_code})"
    )
    with zipfile.ZipFile(folder / VERIFY, "w") as archive:
        archive.writestr("__main__.py", program)
    return folder


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`ssh` and `scp` that do their work here, and write down how they were called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    log = f'printf "%s\\n" "$(basename "$0") $*" >> {tmp_path}/calls\n'
    (tools / "ssh").write_text(f'#!/bin/sh\n{log}for last; do :; done\nexec sh -c "$last"\n')
    copy = 'for last; do from=$to; to=$last; done\nexec cp -r "$from" "${to#*:}"\n'
    (tools / "scp").write_text(f"#!/bin/sh\n{log}{copy}")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tmp_path / "calls"


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def test_what_was_run_there_and_what_to_do_is_shown() -> None:
    fix = {"expected": "the package", "fix": "pip install onnxruntime"}
    check = {"name": "runtime", "outcome": "NOT RUN", "found": "cannot be imported", **fix}
    verify = {"artifact": "onnx", "note": "no engine was run: no GPU; there is sm86", "checks": [check]}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(remote_table({"host": "me@board", "exit_code": 4, "verify": verify}))
    shown = console.export_text()
    assert "no engine was run: no GPU; there is sm86" in shown
    assert "do this: pip install onnxruntime" in shown


@pytest.mark.parametrize("exit_code", [0, 1, 4])
def test_the_result_and_its_exit_code_come_back(fake: Path, tmp_path: Path, exit_code: int) -> None:
    folder = bundle(tmp_path / "bundle", exit_code=exit_code)
    options = ("--ssh", "me@board", "-p", "2222", "-i", "key", "--python", sys.executable, "--rounds", "7")
    result = bench(*options, str(folder), "--json")
    assert result.exit_code == exit_code, result.output
    found = json.loads(result.stdout)
    assert (found["host"], found["exit_code"], found["verify"]["checks"]) == ("me@board", exit_code, CHECKS)
    assert found["verify"]["argv"] == ["verify", ".", "--json", "--rounds", "7"]
    calls = fake.read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["ssh", "scp", "ssh", "ssh"]
    assert "BatchMode=yes" in calls[0]
    assert "-p 2222 -i key me@board mktemp -d" in calls[0]
    assert "-P 2222 -i key" in calls[1]
    remote = calls[3].split()[-1]
    assert calls[3].endswith(f"rm -rf {remote}")
    assert not Path(remote).exists()
    shown = bench(*options, str(folder)).stdout
    assert "onnx on me@board" in shown
    assert "digit differs by 0.5" in shown


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("python", "body", "error", "message"),
    [
        ("/no/python", "", MissingDependencyError, "board has no /no/python"),
        (sys.executable, "import no_such_numpy", MissingDependencyError, "on board has no no_such_numpy"),
        (sys.executable, "print('x'); raise SystemExit(3)", HeadwiseError, r"board gave no result \(exit code 3\): x"),
    ],
)
def test_what_a_board_may_lack(
    python: str, body: str, error: type[HeadwiseError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        bench_remote(Board(host="board", python=python), bundle(tmp_path / "bundle", body=body), rounds=5)


def test_boards_that_cannot_be_used(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle(tmp_path / "bundle")
    board = Board(host="board")
    ssh = fake.parent / "bin" / "ssh"
    works = ssh.read_text()
    ssh.write_text("#!/bin/sh\necho no route >&2\nexit 255\n")
    with pytest.raises(MachineError, match="board cannot be reached: no route"):
        bench_remote(board, folder, rounds=5)
    ssh.write_text("#!/bin/sh\necho Welcome\n")
    with pytest.raises(HeadwiseError, match='board made no folder: "Welcome"'):
        bench_remote(board, folder, rounds=5)
    ssh.write_text(works)
    (fake.parent / "bin" / "scp").write_text("#!/bin/sh\necho disk full >&2\nexit 1\n")
    with pytest.raises(MachineError, match="cannot be copied to board: disk full"):
        bench_remote(board, folder, rounds=5)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="there is no ssh on this machine"):
        bench_remote(board, folder, rounds=5)


def test_what_is_no_bundle_or_no_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"holds no {VERIFY}"):
        bench_remote(Board(host="board"), tmp_path, rounds=5)
    with pytest.raises(DataError, match='"-oProxyCommand=x" is no host'):
        bench_remote(Board(host="-oProxyCommand=x"), bundle(tmp_path / "bundle"), rounds=5)
    for arguments, message in (
        (["--ssh", "a", "x", "y"], "--ssh and 2 artifacts"),
        (["-p", "22", "x"], "options of --ssh without --ssh"),
    ):
        result = bench(*arguments)
        assert result.exit_code == 2
        assert message in result.output


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Port and key of an ssh server that only this test can use."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "authorized",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
    }
    (tmp_path / "config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    log = (tmp_path / "log").open("w")
    run = Path("/run/sshd")
    # What its service makes before it starts the server.
    made = os.geteuid() == 0 and not run.exists()
    if made:
        run.mkdir()
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(tmp_path / "config")], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port, tmp_path / "user"
    finally:
        process.terminate()
        process.wait()
        log.close()
        if made:
            run.rmdir()


@pytest.mark.skipif(not SSHD, reason="sshd is not installed (openssh-server)")
def test_a_real_server(server: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, key = server
    # A first connection asks whether the host is the right one; here nobody can have changed it.
    real = shutil.which("ssh")
    tools = tmp_path / "bin"
    tools.mkdir()
    trust = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    (tools / "ssh").write_text(f'#!/bin/sh\nexec {real} {trust} "$@"\n')
    (tools / "scp").write_text(f'#!/bin/sh\nexec {shutil.which("scp")} {trust} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    host = f"{getpass.getuser()}@127.0.0.1"
    folder = bundle(tmp_path / "bundle", exit_code=1)
    options = ("-p", str(port), "-i", str(key), "--python", sys.executable, "--json")
    result = bench("--ssh", host, *options, str(folder))
    assert result.exit_code == 1, result.output + (tmp_path / "log").read_text()
    assert json.loads(result.stdout)["verify"]["checks"] == CHECKS
    refused = bench("--ssh", host, "-p", "1", "-i", str(key), str(folder))
    assert refused.exit_code == 4
    assert "cannot be reached" in refused.output
