"""What is done of a run, on disk, so that a killed run continues.

An unfinished run lies beside its output, in `OUTPUT.unfinished/`: `journal.jsonl`, and `result/`, which is renamed to
the output when whole. So the output folder is either absent or complete, and an unfinished one says so by its name.

The journal's first line is the run's fingerprint; each further line says that one unit (a layer, or the tensors that
are only copied) is written: its digest and its record. A line is added after the unit's bytes are on disk, and synced.
On restart a last line that was cut off is dropped, and a unit counts only if its bytes still have their digest.
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
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{self.folder}: another run is at work on this output; wait for it.") from None
        lines, length = self._whole_lines()
        if lines and not restart:
            changed = [key for key in sorted(fingerprint) if lines[0].get(key) != fingerprint[key]]
            if changed:
                raise CheckpointError(
                    f"{self.folder} holds an unfinished run with another {', '.join(changed)}; run that one to its "
                    "end, choose another run.output, or discard it with --restart."
                )
            self.entries = {line["unit"]: line for line in lines[1:]}
            os.ftruncate(self._descriptor, length)
            return
        if restart and self.result.exists():
            shutil.rmtree(self.result)
        os.ftruncate(self._descriptor, 0)
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
            if not line.endswith(b"\n") or not isinstance(found, dict) or (lines and "unit" not in found):
                break
            lines.append(found)
            length += len(line)
        return lines, length

    def _append(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        os.lseek(self._descriptor, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)

    def add(self, unit: str, digest: str, record: Mapping[str, Any] | None) -> None:
        """Say that a unit is written: its bytes must be on disk. Safe from several threads."""
        line = {"unit": unit, "digest": digest, "record": record}
        with self._lock:
            self._append(line)
            self.entries[unit] = line

    def finish(self, output: Path) -> None:
        """Rename the result to `output`, which must not exist or be empty, and drop the journal."""
        self.result.rename(output)
        sync_folder(output.parent)
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
