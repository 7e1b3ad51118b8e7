"""What is done of a run, on disk, so that a killed run continues.

An unfinished run lies beside its output, in `OUTPUT.unfinished/`: `journal.jsonl`, and `result/`, which is renamed to
the output when whole. So the output folder is either absent or complete, and an unfinished one says so by its name.

The journal's first line is the run's fingerprint; each further line says that one unit (a layer, or the tensors that
are only copied) is written: its digest and its record. A line is added after the unit's bytes are on disk, and synced.
On restart a last line that was cut off is dropped, a line that is no entry is passed over, and a unit counts only if
its bytes still have their digest.

Of several processes (loraq/team.py) each appends to a file of its own, `journal.1.jsonl` and so on beside the first
one's, so that no line depends on another machine. The next start, of however many processes, takes all into the first
file.

`restart` replaces: an unfinished run of another fingerprint is discarded, a finished output makes way for the new one
once that is whole. An unfinished run of the same fingerprint is continued all the same, so that the command which was
killed, `--restart` and all, continues.
"""

from __future__ import annotations

import contextlib
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
from loraq.team import Team


def work_folder(output: Path) -> Path:
    """Where an unfinished run keeps its state."""
    return output.with_name(f"{output.name}.unfinished")


def _is_entry(line: dict[str, Any]) -> bool:
    return (
        isinstance(line.get("unit"), str)
        and isinstance(line.get("digest"), str)
        and isinstance(line.get("record", ...), dict | None)
    )


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

    `entries` maps each unit that a line calls written to that line. `number` is the process's in a team: the first
    takes up what there is, the others begin a file of their own once it has. Raises CheckpointError where the journal
    belongs to a run with another fingerprint, unless `restart` discards it.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, restart: bool = False, number: int = 0) -> None:
        self.folder = work_folder(output)
        self.result = self.folder / "result"
        self.entries: dict[str, dict[str, Any]] = {}
        self._path = self.folder / ("journal.jsonl" if number == 0 else f"journal.{number}.jsonl")
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"run.output: {self.folder} cannot be written ({error.strerror}).") from None
        try:
            self._refuse_second(self._descriptor, self._path)
            if number == 0:
                self._take_up(fingerprint, restart=restart)
            else:
                self._begin(fingerprint)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _refuse_second(self, descriptor: int, path: Path) -> None:
        if not _locked(descriptor, path):
            raise CheckpointError(f"{self.folder}: another run is at work on this output; wait for it.")

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        os.ftruncate(self._descriptor, 0)
        self._append(dict(fingerprint))
        sync_folder(self.folder)

    def _take_up(self, fingerprint: Mapping[str, Any], *, restart: bool) -> None:
        told = json.loads(json.dumps(fingerprint))
        made, entries, length = _read(self._path)
        changed = [key for key in sorted(told) if made is not None and made.get(key) != told[key]]
        if changed and not restart:
            raise CheckpointError(
                f"{self.folder} holds an unfinished run with another {', '.join(changed)}; run that one to its "
                "end, choose another run.output, or discard it with --restart."
            )
        others = self._of_others(told)
        if made is not None and not changed:
            self.entries = entries
            os.ftruncate(self._descriptor, length)
            for unit, line in others.items():
                if unit not in entries:
                    self.add(unit, line["digest"], line["record"])
        else:
            os.ftruncate(self._descriptor, 0)  # before the result goes: what lies there has no journal and counts not
            if self.result.exists():  # of a run that is discarded, or whose journal is lost
                shutil.rmtree(self.result)
            self._begin(fingerprint)
        for path in self._files_of_others():
            path.unlink()

    def _files_of_others(self) -> list[Path]:
        return sorted(self.folder.glob("journal.*.jsonl"))

    def _of_others(self, fingerprint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What the other processes of the run before wrote. Raises CheckpointError where one is still at work."""
        found: dict[str, dict[str, Any]] = {}
        for path in self._files_of_others():
            descriptor = os.open(path, os.O_RDWR)
            try:
                self._refuse_second(descriptor, path)
                made, entries, _ = _read(path)
            finally:
                os.close(descriptor)
            if made == fingerprint:
                found |= entries
        return found

    def _append(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        start = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:  # no room: leave no torn line for another line to follow
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
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if not self.result.exists():
            with contextlib.suppress(OSError):  # a network file system keeps an open file's folder until it is closed
                self.folder.rmdir()


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]], int]:
    """A journal's fingerprint, None where it has none, its entries by unit, and the length of its whole lines."""
    text = path.read_bytes()
    length = text.rfind(b"\n") + 1
    made: dict[str, Any] | None = None
    entries: dict[str, dict[str, Any]] = {}
    for index, line in enumerate(text[:length].split(b"\n")):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if index == 0:
            made = found if isinstance(found, dict) else None
        elif isinstance(found, dict) and _is_entry(found):
            entries[found["unit"]] = found
    return (made, entries, length) if made is not None else (None, {}, 0)


def open_journal(output: Path, fingerprint: Mapping[str, Any], team: Team, *, restart: bool = False) -> Journal:
    """The journal of this process: the first one's takes up what there is, then the others begin theirs beside it.

    Raises CheckpointError where the processes do not see one folder.
    """
    if team.alone:
        return Journal(output, fingerprint, restart=restart)
    journal = Journal(output, fingerprint, restart=restart) if team.first else None
    try:
        team.see_alike(work_folder(output), "run.output")
        return journal or Journal(output, fingerprint, number=team.number)
    except BaseException:
        if journal is not None:
            journal.__exit__(None, None, None)
        raise
