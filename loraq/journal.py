"""What is done of a run, on disk, so that a killed run continues.

An unfinished run lies beside its output, in `OUTPUT.unfinished/`: `journal.jsonl`, and `result/`, which is renamed to
the output when whole. So the output folder is either absent or complete, and an unfinished one says so by its name.

The journal's first line is the run's fingerprint; each further line says that one unit (a layer, or the tensors that
are only copied) is written: its digest and its record. A line is added after the unit's bytes are on disk, and synced.
On restart a last line that was cut off is dropped, and a unit counts only if its bytes still have their digest.

`restart` replaces: an unfinished run of another fingerprint is discarded, a finished output makes way for the new one
once that is whole. An unfinished run of the same fingerprint is continued all the same, so that the command which was
killed, `--restart` and all, continues.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraq.checkpoint import sync_folder
from loraq.errors import CheckpointError


def work_folder(output: Path) -> Path:
    """Where an unfinished run keeps its state."""
    return output.with_name(f"{output.name}.unfinished")


_KEYS = {"unit", "digest", "record"}


def _locked(descriptor: int, path: Path) -> bool:
    """Take the lock of the journal at `path`; False where another run has it, or has just finished and removed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def drop_leftovers(output: Path) -> None:
    """Remove what a run leaves that was killed after its last rename, unless a run is at work there."""
    path = work_folder(output) / "journal.jsonl"
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        if _locked(descriptor, path):
            shutil.rmtree(path.parent, ignore_errors=True)
    finally:
        os.close(descriptor)


class Journal:
    """The journal of one run, held open and locked: a second run of the same output is refused.

    `entries` maps each unit that a line calls written to that line. Raises CheckpointError where the journal belongs
    to a run with another fingerprint, unless `restart` discards it.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = work_folder(output)
        self.result = self.folder / "result"
        self.entries: dict[str, dict[str, Any]] = {}
        self._path = self.folder / "journal.jsonl"
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"run.output: {self.folder} cannot be written ({error.strerror}).") from None
        try:
            self._take_up(fingerprint, restart=restart)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take_up(self, fingerprint: Mapping[str, Any], *, restart: bool) -> None:
        if not _locked(self._descriptor, self._path):
            raise CheckpointError(f"{self.folder}: another run is at work on this output; wait for it.")
        lines, length = self._whole_lines()
        changed = [key for key in sorted(fingerprint) if lines and lines[0].get(key) != fingerprint[key]]
        if changed and not restart:
            raise CheckpointError(
                f"{self.folder} holds an unfinished run with another {', '.join(changed)}; run that one to its "
                "end, choose another run.output, or discard it with --restart."
            )
        if lines and not changed:
            self.entries = {line["unit"]: line for line in lines[1:]}
            os.ftruncate(self._descriptor, length)
            return
        os.ftruncate(self._descriptor, 0)
        if self.result.exists():  # of a run that is discarded, or whose journal is lost: nothing in it counts
            shutil.rmtree(self.result)
        self._append(dict(fingerprint))
        sync_folder(self.folder)

    def _whole_lines(self) -> tuple[list[dict[str, Any]], int]:
        """The lines that are whole, and the length of the file up to their end."""
        with self._path.open("rb") as file:
            text = file.read()
        lines: list[dict[str, Any]] = []
        length = 0
        for line in text.splitlines(keepends=True):
            try:
                found = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(found, dict) or (lines and not found.keys() >= _KEYS):
                break
            lines.append(found)
            length += len(line)
        return lines, length

    def _append(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        start = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:  # no room: leave no torn line for another worker's line to follow
            os.ftruncate(self._descriptor, start)
            raise
        os.fsync(self._descriptor)

    def add(self, unit: str, digest: str, record: Mapping[str, Any] | None) -> None:
        """Say that a unit is written: its bytes must be on disk. Safe from several threads."""
        line = {"unit": unit, "digest": digest, "record": record}
        with self._lock:
            self._append(line)
            self.entries[unit] = line

    def finish(self, output: Path) -> None:
        """Rename the result to `output` and drop the journal; what lay there makes way only now."""
        if output.exists():
            replaced = self.folder / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        self.result.rename(output)
        sync_folder(output.parent)
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
