"""The command `loraq`, for tests: within this process, which takes no seconds to start, or as a real process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import attrs
import psutil

LORAQ = str(Path(sys.executable).with_name("loraq"))


@attrs.frozen
class Finished:
    """What a command left."""

    code: int
    out: str
    err: str


def loraq(*arguments: object) -> Finished:
    """Run `loraq` to its end in this process."""
    from loraq.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["loraq", *map(str, arguments)]),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


def process(*arguments: object, **environment: str) -> Finished:
    """Run `loraq` to its end as a process of its own."""
    found = subprocess.run(
        [LORAQ, *map(str, arguments)], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    return Finished(found.returncode, found.stdout, found.stderr)


def done(finished: Finished) -> str:
    """What the command printed; it must have ended with exit code 0."""
    assert finished.code == 0, finished
    return finished.out


def refused(finished: Finished, code: int = 2) -> str:
    """What the command said when it refused: sentences on standard error, never a traceback, and no result."""
    assert (finished.code, finished.out) == (code, ""), finished
    assert "Traceback" not in finished.err, finished.err
    assert all(line.startswith("error: ") for line in finished.err.splitlines()), finished.err
    return finished.err


_FORKER = """
import json, os, sys
import loraq.diffusers, loraq.commands.run, loraq.run
from diffusers import PixArtTransformer2DModel
from loraq.cli import main

for line in sys.stdin:
    log, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["loraq", *arguments]
        main()
        sys.exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """Starts `loraq` again and again as a process of its own, in no time: by forking one that has imported all."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-c", _FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._child = 0

    def _read(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def start(self, *arguments: object) -> None:
        """Start `loraq`; what it prints goes to the log."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([str(self.log), *map(str, arguments)]) + "\n")
        self._server.stdin.flush()
        self._child = self._read()

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return psutil.pid_exists(self._child)

    def end(self, signal: int | None = None) -> int:
        """Send `signal`, if one is given, and wait. Returns the exit code, or minus the signal that ended it."""
        if signal is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal)
        return self._read()

    def close(self) -> None:
        """End the server."""
        self._server.communicate()
