"""The processes of one run, as `torchrun` starts them on one machine or several, and what they tell one another.

All run the same code over the same plan; which process does which piece is the only thing that differs. They talk
through torch.distributed's store, a small server of keys and numbers: a queue's next place is a number that is counted
up, results and errors are short texts. Weights and codes never pass through it (they lie in shared folders), and no
collective operation is needed, so that a process may be busy for as long as it likes.

    share   the first process makes a value, all get it     queue   pieces of work, drawn one at a time by who is free
    meet    all have come this far                          check   raise what ended another process

An error in one process ends all, with its sentence. A process that is killed says nothing; torchrun then ends the
others. Alone, without torchrun, a team is one process and nothing here imports torch.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from loraq.errors import CheckpointError, InputError, LoraqError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # its __all__ is made at run time

Answer = TypeVar("Answer")

POLL = 0.05
"""Seconds between two looks at what the others did."""
PATIENCE = 60.0
"""Seconds that another machine's file may take to be seen: network file systems remember for 30 what is not there."""
_FAREWELL = 600.0
"""Seconds that an ending run waits for what the other processes have in flight."""
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_joined = itertools.count()
"""The runs of this process so far: each has keys of its own in the store. All processes count alike."""


def _whole_number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise InputError(
            f"{name} is '{os.environ[name]}' in the environment; start the processes by torchrun."
        ) from None


def join() -> Team:
    """The team that the environment names, as torchrun sets it; a team of one without."""
    if any(name not in os.environ for name in _ENVIRONMENT) or _whole_number("WORLD_SIZE", 1) < 2:
        return Team()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a store that is gone is told in pages of addresses
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # as above

    try:
        store, number, size = next(iter(rendezvous("env://", timeout=datetime.timedelta(minutes=5))))
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ[name] for name in _ENVIRONMENT[2:])
        raise LoraqError(
            f"the other processes cannot be reached at {where} ({_reason(error)}); start all by torchrun, with one "
            "--rdzv-endpoint that every machine can reach."
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Team(
        PrefixStore(f"loraq/{attempt}/{next(_joined)}", store),
        number,
        size,
        local_number=_whole_number("LOCAL_RANK", 0),
        local_size=_whole_number("LOCAL_WORLD_SIZE", 1),
    )


def number_here() -> int:
    """The process's number by the environment, before a team is joined."""
    known = all(name in os.environ for name in _ENVIRONMENT)
    return _whole_number("RANK", 0) if known else 0


class Team:
    """One process's view of all: `number` of `size`, counted from 0; on its machine `local_number` of `local_size`.

    Every process must call `share`, `meet`, `queue` and `see_alike` in the same order.
    """

    def __init__(
        self,
        store: Store | None = None,
        number: int = 0,
        size: int = 1,
        *,
        local_number: int = 0,
        local_size: int = 1,
    ) -> None:
        self.number, self.size = number, size
        self.local_number, self.local_size = local_number, local_size
        self._store = store
        self._calls = itertools.count()
        self._told: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that opens the journal, prints and finishes."""
        return self.number == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self._store is None

    @property
    def me(self) -> str:
        """The process, for a sentence."""
        return f"process {self.number} of {self.size} on {socket.gethostname()}"

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process, as JSON has it, in all."""
        key = f"share/{next(self._calls)}"
        if not self.first:
            return json.loads(self._awaited(key))
        text = json.dumps(make())
        if self._store is not None:
            self._asked(lambda store: store.set(key, text))
        return json.loads(text)

    def meet(self) -> None:
        """Wait until all processes are here."""
        key = f"meet/{next(self._calls)}"
        if self._store is not None:
            self._asked(lambda store: store.add(key, 1))
            while self._asked(lambda store: store.add(key, 0)) < self.size:
                self._pause()

    def queue(self) -> Queue:
        """A queue that all processes draw from."""
        return Queue(self, f"queue/{next(self._calls)}")

    def check(self) -> None:
        """Raise what ended another process, if anything did."""
        if self._store is None or not self._asked(lambda store: store.check(["failure"])):
            return
        found = json.loads(self._asked(lambda store: store.get("failure")))
        self._told = str(found["told"])
        raise (InputError if found["code"] == InputError.exit_code else LoraqError)(self._told)

    def see_alike(self, folder: Path, what: str) -> None:
        """Raise CheckpointError where `folder`, which `what` names, is not one folder that all processes may write."""
        if self._store is None:
            return
        mark = folder / self.share(lambda: _marked(folder, what))
        deadline = time.monotonic() + PATIENCE
        while not mark.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{what}: {folder} is another folder there than in the first process; name one that all machines "
                    "share."
                )
            self._pause()
        self.meet()
        if self.first:
            mark.unlink()

    def _awaited(self, key: str) -> bytes:
        """The value of a key, once it is set."""
        while not self._asked(lambda store: store.check([key])):
            self._pause()
        return self._asked(lambda store: store.get(key))

    def _pause(self) -> None:
        self.check()
        time.sleep(POLL)

    def _asked(self, ask: Callable[[Store], Answer]) -> Answer:
        assert self._store is not None, "a process alone asks nobody"
        try:
            return ask(self._store)
        except RuntimeError as error:
            raise LoraqError(
                f"{self.me}: the others cannot be reached any more ({_reason(error)}); start all again, and the same "
                "command continues."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others of an error; the first process leaves last."""
        if self._store is None:
            return
        if error is not None:
            _tell_launcher(self._failure(error)["told"])
        with contextlib.suppress(RuntimeError):  # the store may be gone with the process that held it
            if error is not None and str(error) != self._told:
                self._store.set("failure", json.dumps(self._failure(error)))
            self._store.add("left", 1)
            store = self._store
            if self.first:
                _linger(lambda: store.add("left", 0) >= self.size)

    def end_after_first(self) -> None:
        """Return only when the first process is at its end: torchrun ends it, unread, when another one failed before.

        The first process returns at once.
        """
        if self._store is None:
            return
        store = self._store
        if self.first:
            atexit.register(_say_farewell, store)
            return
        with contextlib.suppress(RuntimeError):
            _linger(lambda: store.check(["farewell"]))

    def _failure(self, error: BaseException) -> dict[str, Any]:
        told = str(error) if isinstance(error, LoraqError) else f"{type(error).__name__}: {_reason(error)}"
        code = error.exit_code if isinstance(error, LoraqError) else 1
        return {"told": told if self.first or told == self._told else f"{self.me}: {told}", "code": code}


class Queue:
    """Places 0, 1, 2 ... of work, each drawn by one process only, and what all processes say of the work done."""

    def __init__(self, team: Team, key: str) -> None:
        self._team = team
        self._key = key
        self._places = itertools.count()
        self._seen = 0

    def draw(self) -> int:
        """The next place."""
        if self._team.alone:
            return next(self._places)
        return self._team._asked(lambda store: store.add(f"{self._key}/drawn", 1)) - 1

    def post(self, place: int, result: Any) -> None:
        """Tell the others the result, which JSON must be able to hold, of a place that was drawn here."""
        if self._team.alone:
            return
        text = json.dumps([self._team.number, place, result])
        entry = self._team._asked(lambda store: store.add(f"{self._key}/posted", 1)) - 1
        self._team._asked(lambda store: store.set(f"{self._key}/{entry}", text))

    def posted(self) -> list[tuple[int, Any]]:
        """Places and results that other processes posted since the last call. Raises what ended one of them."""
        if self._team.alone:
            return []
        self._team.check()
        found = []
        until = self._team._asked(lambda store: store.add(f"{self._key}/posted", 0))
        for entry in range(self._seen, until):
            number, place, result = json.loads(self._team._awaited(f"{self._key}/{entry}"))
            if number != self._team.number:
                found.append((place, result))
        self._seen = until
        return found


def _linger(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _FAREWELL
    while not done() and time.monotonic() < deadline:
        time.sleep(POLL)


def _tell_launcher(told: str) -> None:
    """Put the sentence where torchrun looks for it: it reports on every machine, the first process on one only."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told, "timestamp": int(time.time())}), encoding="utf-8")


def _say_farewell(store: Store) -> None:
    with contextlib.suppress(RuntimeError):
        store.set("farewell", "")


def _marked(folder: Path, what: str) -> str:
    """The name of a new file in `folder`."""
    mark = folder / f".loraq-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise CheckpointError(f"{what}: {folder} cannot be written ({error.strerror}).") from None
    return mark.name


def _reason(error: BaseException) -> str:
    """An error's first line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
