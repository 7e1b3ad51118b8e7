"""Layers in flight, over devices, processes and machines: the same bytes, each layer once, one sentence for all."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

import models
from command import Finished, done, loraq, refused
from loraq import fitting
from loraq import run as run_module
from loraq import team as team_module
from loraq import workers as workers_module
from loraq.errors import CheckpointError, InputError, LoraqError
from loraq.journal import Journal, work_folder
from loraq.pipeline import Pipeline, make_stage
from loraq.recipe import load
from loraq.run import run_recipe
from loraq.team import Team, join
from loraq.workers import Workers, in_parallel, resolved_devices

CPU = torch.device("cpu")


# Teams, as threads of one process with a store in memory


def together(size: int, act: Callable[[Team], Any]) -> list[Any]:
    """What `act` gives or raises in each of `size` members of a team."""
    store = HashStore()

    def member(number: int) -> Any:
        try:
            with Team(store, number, size) as team:
                return act(team)
        except LoraqError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


def test_what_the_first_makes_all_get() -> None:
    made: list[int] = []

    def act(team: Team) -> Any:
        def make() -> dict[str, Any]:
            made.append(team.number)
            return {"by": team.number, "list": (1, 2)}

        return team.share(make), team.share(lambda: "second")

    assert together(3, act) == [({"by": 0, "list": [1, 2]}, "second")] * 3
    assert made == [0]
    assert Team().share(lambda: (1, 2)) == [1, 2], "alone it is what JSON has as well"


def test_all_meet() -> None:
    arrived: list[int] = []

    def act(team: Team) -> int:
        time.sleep(0.02 * team.number)
        arrived.append(team.number)
        team.meet()
        return len(arrived)

    assert together(3, act) == [3, 3, 3]


def test_the_first_error_ends_all_with_its_sentence() -> None:
    def act(team: Team) -> None:
        if team.number == 1:
            raise CheckpointError("there is no room; make some.")
        team.meet()

    zero, one, two = together(3, act)
    assert type(one) is CheckpointError
    assert str(one) == "there is no room; make some."
    assert isinstance(zero, InputError), "its exit code is 2 for all"
    assert str(zero) == str(two)
    assert str(zero).startswith("process 1 of 3 on ")
    assert str(zero).endswith(": there is no room; make some.")


def test_what_is_no_error_of_the_user_ends_all_with_exit_code_1() -> None:
    def act(team: Team) -> None:
        if team.first:
            with contextlib.suppress(ZeroDivisionError), team:
                raise ZeroDivisionError("by zero\nand more")
        else:
            team.meet()

    _, other = together(2, act)
    assert (str(other), other.exit_code) == ("ZeroDivisionError: by zero", 1)


class GoneStore:
    """A store whose server was killed."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def asked(*arguments: object) -> None:
            raise RuntimeError("Connection reset by peer\nframe #0: c10::Error")

        return asked


def test_a_process_that_the_others_left_ends_in_a_sentence() -> None:
    acts: list[Callable[[Team], Any]] = [
        lambda team: team.share(lambda: 1),
        Team.meet,
        Team.check,
        lambda team: team.queue().draw(),
        lambda team: team.queue().posted(),
        lambda team: list(in_parallel(lambda *_: 1, range(3), workers=Workers((CPU,), 1, 1, team))),
    ]
    sentence = (
        r"^process [01] of 2 on \S+: the others cannot be reached any more \(Connection reset by peer\); start all "
        r"again, and the same command continues\.$"
    )
    for number, act in itertools.product((0, 1), acts):
        with pytest.raises(LoraqError, match=sentence), Team(GoneStore(), number, 2) as team:  # type: ignore[arg-type]
            act(team)


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team_module, "PATIENCE", 0.2)
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    results = together(2, lambda team: team.see_alike(tmp_path / str(team.number), "run.output"))
    assert str(results[1]) == (
        f"run.output: {tmp_path / '1'} is another folder there than in the first process; name one that all machines "
        "share."
    )
    assert str(results[0]).endswith(str(results[1]))
    assert together(2, lambda team: team.see_alike(tmp_path / "shared", "run.output")) == [None, None]
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_process_that_was_told_something_else_is_refused() -> None:
    def act(team: Team) -> None:
        versions = {"torch": "2.6" if team.number == 1 else "2.7"}
        run_module._refuse_difference(team, {"recipe": "a", "versions": versions, "sizes": (1, 2)})
        team.meet()

    zero, one = together(2, act)
    assert str(one) == (
        "its versions differ from the first process's; give all processes the same recipe, model, versions and kind of "
        "device."
    )
    assert str(zero).startswith("process 1 of 2 on ")
    assert str(zero).endswith(f": {one}")


def test_what_another_process_wrote_is_read_back_before_the_shards_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.saved_pipeline(tmp_path / "model", layers=1)
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")
    finish = fitting._finish

    def as_if_of_another(plan: Any, journal: Journal, team: Team, written: Any, *, lost: bool) -> None:
        line = journal.entries.pop("transformer:transformer_blocks.0.attn1.to_k")
        digest = "of bytes that this machine does not see" if lost else line["digest"]
        finish(plan, journal, team, written | {line["unit"]: line | {"digest": digest}})

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_finish", functools.partial(as_if_of_another, lost=True))
        sentence = refused(loraq("run", recipe))
    assert sentence == (
        f"error: run.output: {work_folder(tmp_path / 'out')} does not hold what another process wrote of "
        "'transformer_blocks.0.attn1.to_k'; put it on a file system that all machines share.\n"
    )
    monkeypatch.setattr(fitting, "_finish", functools.partial(as_if_of_another, lost=False))
    done(loraq("run", recipe))


@given(count=st.integers(0, 12), size=st.integers(1, 4), workers=st.integers(1, 3), devices=st.integers(1, 3))
@settings(max_examples=20)
def test_every_item_is_read_fitted_and_kept_once_and_all_learn_all(
    count: int, size: int, workers: int, devices: int
) -> None:
    log: list[tuple[str, int]] = []

    def read(item: int) -> int:
        log.append(("read", item))
        return 10 * item

    def fit(item: int, loaded: int, device: torch.device) -> int:
        log.append(("fit", item))
        assert (loaded, device) == (10 * item, CPU)
        return loaded + 1

    def keep(item: int, result: int) -> list[int]:
        log.append(("keep", item))
        return [result, 2 * result]

    def act(team: Team) -> list[Any]:
        crew = Workers((CPU,) * devices, workers, 1, team)
        return sorted(in_parallel(fit, range(count), workers=crew, read=read, keep=keep))

    expected = [(item, [10 * item + 1, 20 * item + 2]) for item in range(count)]
    assert (together(size, act) if size > 1 else [act(Team())]) == [expected] * size
    assert sorted(log) == sorted((what, item) for what in ("read", "fit", "keep") for item in range(count))


def test_layers_in_flight_are_spread_over_the_devices() -> None:
    here, used = threading.Barrier(4, timeout=20), []

    def fit(item: int, loaded: None, device: torch.device) -> None:
        here.wait()  # four fits at once
        used.append(device)

    devices = (torch.device("cpu", 0), torch.device("cpu", 1))
    assert len(list(in_parallel(fit, range(8), workers=Workers(devices, 4, 1)))) == 8
    assert sorted(each.index for each in used) == [0] * 4 + [1] * 4


def test_a_slow_disk_holds_up_no_fit_until_results_would_pile_up() -> None:
    begun, may_write = threading.Semaphore(0), threading.Event()
    kept: list[int] = []

    def fit(item: int, loaded: None, device: torch.device) -> None:
        begun.release()

    def keep(item: int, result: None) -> None:
        assert may_write.wait(20)
        kept.append(item)

    def drive() -> None:
        list(in_parallel(fit, range(9), workers=Workers((CPU,), 2, 1), keep=keep))

    thread = threading.Thread(target=drive)
    thread.start()
    for _ in range(4):  # twice the workers
        assert begun.acquire(timeout=20), "a fit waits for the disk"
    assert not begun.acquire(timeout=0.2), "there is no end to what is held in memory"
    assert kept == []
    may_write.set()
    thread.join()
    assert kept == list(range(9))


def test_on_error_what_is_in_flight_is_kept_and_nothing_is_begun() -> None:
    both, failed = threading.Barrier(2, timeout=20), threading.Event()
    begun, kept = [], []

    def fit(item: int, loaded: None, device: torch.device) -> int:
        begun.append(item)
        if item < 2:
            both.wait()
        if item == 0:
            failed.set()
            raise LoraqError("no")
        assert failed.wait(20)
        time.sleep(0.05)
        return item

    with pytest.raises(LoraqError, match="no"):
        list(in_parallel(fit, range(9), workers=Workers((CPU,), 2, 1), keep=lambda item, result: kept.append(item)))
    assert sorted(begun) == [0, 1]
    assert kept == [1]


@pytest.mark.parametrize("stage", ["read", "fit", "keep"])
def test_an_error_in_one_process_ends_the_others_in_the_middle(stage: str) -> None:
    def act(team: Team) -> None:
        def fails(item: int, *arguments: Any) -> None:
            if team.number == 1 and arguments != ("kept",):
                raise InputError(f"bad {stage}")
            time.sleep(0.01)

        crew = Workers((CPU,), 1, 1, team)
        rest: dict[str, Any] = {"read": None, "keep": None} | ({} if stage == "fit" else {stage: fails})
        fit = fails if stage == "fit" else lambda item, loaded, device: None
        for _ in in_parallel(fit, range(1000), workers=crew, **rest):
            pass

    zero, one = together(2, act)
    assert str(one) == f"bad {stage}"
    assert str(zero).endswith(f": bad {stage}")


# Devices


def test_a_list_of_devices_gives_the_same_bytes(tmp_path: Path) -> None:
    model = models.saved_pipeline(tmp_path / "model", layers=1)
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")
    run_recipe(load(recipe))
    several = [f"run.output={tmp_path / 'several'}", 'run.device=["cpu", "cpu", "cpu"]', "run.workers=0"]
    run_recipe(load(recipe, several))
    assert models.tensor_files(tmp_path / "several") == models.tensor_files(tmp_path / "out")
    assert json.loads((tmp_path / "several" / "loraq.json").read_text())["recipe"]["run"]["device"] == ["cpu"] * 3
    assert run_recipe(load(recipe, [*several, "run.device=cpu"])).already_done, "where it ran is no part of the result"


def test_a_module_in_memory_takes_a_list_of_devices() -> None:
    states = []
    for device in ("auto", ["cpu", "cpu"]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)).bfloat16()
        stages = [make_stage("main_quantizer", "rtn"), make_stage("low_rank", "svd", rank=4)]
        Pipeline(stages, device=device).quantize(module)
        states.append(module.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("[]", "run: 'device' must name a device, such as 'auto', got []"),
        ("3", "run.device: expected a string or an array of strings, got 3"),
        ('["cpu", 3]', "run.device: expected a string or an array of strings, got ['cpu', 3]"),
        ('["cpu", "cuda:77"]', "device 'cuda:77' is not to be had here ("),
        ('["cpu", "auto", "meta"]', "device 'meta' computes nothing"),
    ],
)
def test_a_list_that_is_no_list_of_devices_is_refused(device: str, sentence: str, tmp_path: Path) -> None:
    model = models.saved_pipeline(tmp_path / "model", layers=1)
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")
    assert sentence in refused(loraq("run", recipe, "--set", f"run.device={device}"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, the third of another model; nothing is computed on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "B" if device.index == 2 else "A")
    monkeypatch.setattr(workers_module, "resolved_device", torch.device)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))


def indices(crew: Workers) -> list[int]:
    return [device.index for device in crew.devices]


@pytest.mark.usefixtures("gpus")
def test_auto_is_all_gpus_of_one_model_shared_out_over_the_processes_of_a_machine() -> None:
    assert [device.index for device in resolved_devices("auto")] == [0, 1, 3]
    assert indices(Workers.of("auto", 0, 1)) == [0, 1, 3]
    members = [Team(HashStore(), number, 4, local_number=number % 2, local_size=2) for number in range(4)]
    assert [indices(Workers.of("auto", 0, 1, each)) for each in members] == [[0, 3], [1], [0, 3], [1]]
    assert [indices(Workers.of(["cuda:1"], 0, 1, each)) for each in members] == [[1]] * 4
    assert [Workers.of("cpu", 0, 2, each).count for each in members] == [3] * 4, "12 cores for 2 processes of 2 threads"
    assert Workers.of(["cuda:0", "cuda:1"], 0, 12).count == 2, "one a device at least"
    assert Workers.of(["cuda:0", "cuda:1"], 1, 1).count == 1


@pytest.mark.usefixtures("gpus")
def test_devices_that_would_give_other_bytes_are_not_mixed() -> None:
    with pytest.raises(
        InputError, match=r"device 'cuda:2' is a GPU of model B, but 'cuda:1' is a GPU of model A, and "
    ):
        resolved_devices(["cuda:1", "cuda:2"])
    with pytest.raises(InputError, match=r"device 'cuda:0' is a GPU of model A, but 'cpu' is a CPU, and their results"):
        resolved_devices(["cpu", "cuda:0"])


# Real processes


@attrs.frozen
class Launched:
    """A torchrun at work: its process, and what it and its workers print."""

    process: subprocess.Popen[str]
    log: Path

    def workers(self) -> list[psutil.Process]:
        """The processes that it started, by number."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [each for each in psutil.Process(self.process.pid).children() if "loraq" in each.cmdline()]
            return sorted(found, key=lambda each: int(each.environ()["RANK"]))
        return []

    def end(self) -> Finished:
        """Wait for its end; `err` is what LoRaQ itself said."""
        code = self.process.wait(timeout=300)
        text = self.log.read_text()
        said = [line for line in text.splitlines(keepends=True) if line.startswith(("error: ", "interrupted"))]
        # torchrun's own: one where it fails, and one on a machine that looks for the others when they are gone already.
        expected = (code != 0) + text.count("Error waiting on exit barrier")
        assert text.count("Traceback (most recent call last)") == expected, text
        return Finished(code, text, "".join(said))


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts torchrun with so many processes; what is left of them is ended with the test."""
    started: list[Launched] = []

    def begin(count: int, *arguments: object, options: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> Launched:
        log = tmp_path / f"torchrun-{len(started)}.log"
        chosen = options or ("--standalone", f"--nproc-per-node={count}")
        command = [*before, sys.executable, "-m", "torch.distributed.run", *chosen, "-m", "loraq"]
        with log.open("w") as file:
            process = subprocess.Popen([*command, *map(str, arguments)], stdout=file, stderr=file, text=True)
        started.append(Launched(process, log))
        return started[-1]

    yield begin
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(each.process.pid).children(recursive=True)
            each.process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        each.process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a recipe for it, and the result of one process in `plain`."""
    folder = tmp_path_factory.mktemp("home")
    models.saved_pipeline(folder / "model")
    recipe = models.write_recipe(folder / "recipe.toml", folder / "model", folder / "plain", low_rank="loraq_fast")
    recipe.write_text(recipe.read_text().replace("rank = 4", "rank = 4\nsteps = 1000"))
    run_recipe(load(recipe))
    return folder


def units(output: Path) -> dict[str, dict[str, Any]]:
    """What all journals of an unfinished run call written, each unit made once."""
    found: dict[str, dict[str, Any]] = {}
    for path in work_folder(output).glob("journal*.jsonl"):
        text = ""
        with contextlib.suppress(FileNotFoundError):  # a start has just taken it up
            text = path.read_text()
        for line in text.splitlines(keepends=True)[1:]:
            if line.endswith("\n"):
                entry = json.loads(line)
                # A line lies in two journals while a start takes it up; of another fit it would have other seconds.
                assert found.setdefault(entry["unit"], entry) == entry, "no unit is done twice"
    return found


def wait_for(condition: Callable[[], bool], running: Launched) -> None:
    deadline = time.monotonic() + 120
    while not condition() and running.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition(), running.log.read_text()


def fitted_by(output: Path) -> dict[str, Any]:
    """Each layer's record in a finished result: its seconds tell one fit from another."""
    report = json.loads((output / "loraq.json").read_text())["report"]
    return {layer["name"]: layer["seconds"] for layer in report["layers"]}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_gives_the_same_bytes(
    count: int, home: Path, tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    output = tmp_path / "out"
    finished = launch(count, "run", home / "recipe.toml", "--set", f"run.output={output}").end()
    assert finished.code == 0, finished.out
    assert models.tensor_files(output) == models.tensor_files(home / "plain")
    assert finished.out.count("done in") == 1, "one process prints"
    assert not work_folder(output).exists()
    assert run_recipe(load(home / "recipe.toml", [f"run.output={output}"])).already_done
    if count == 2:
        again = launch(count, "run", home / "recipe.toml", "--set", f"run.output={output}").end()
        assert again.out.count("was finished already") == 1


@pytest.mark.slow
def test_killed_in_the_middle_another_number_of_processes_continues(
    home: Path, tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    output = tmp_path / "out"
    arguments = ("run", home / "recipe.toml", "--set", f"run.output={output}")
    seen: dict[str, dict[str, Any]] = {}
    for count, victim in ((3, 1), (2, 0)):
        running = launch(count, *arguments)
        wait_for(lambda seen=seen: len(units(output)) >= len(seen) + 4, running)
        os.kill(running.workers()[victim].pid, signal.SIGKILL)
        assert running.end().code == 1
        now = units(output)
        assert {unit: now[unit] for unit in seen} == seen, "what is done stays done, and is not done again"
        seen = now
        assert not output.exists()
    assert len({Path(path).name for path in work_folder(output).glob("journal*")}) == 2
    done(loraq(*arguments))
    records = {entry["record"]["name"]: entry["record"] for entry in seen.values() if entry["record"]}
    made = fitted_by(output)
    assert {name: made[name] for name in records} == {name: record["seconds"] for name, record in records.items()}
    assert models.tensor_files(output) == models.tensor_files(home / "plain")


@pytest.mark.slow
def test_torchrun_starts_anew_what_was_killed_and_it_continues(
    home: Path, tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    output = tmp_path / "out"
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    running = launch(2, "run", home / "recipe.toml", "--set", f"run.output={output}", options=options)
    wait_for(lambda: len(units(output)) >= 4, running)
    before = units(output)
    os.kill(running.workers()[1].pid, signal.SIGKILL)
    assert running.end().code == 0
    made = fitted_by(output)
    records = {entry["record"]["name"]: entry["record"]["seconds"] for entry in before.values() if entry["record"]}
    assert records.items() <= made.items()
    assert models.tensor_files(output) == models.tensor_files(home / "plain")


@pytest.mark.slow
def test_an_error_is_told_once_for_all_processes(home: Path, tmp_path: Path, launch: Callable[..., Launched]) -> None:
    model = models.copy_of(home / "model", tmp_path / "spoilt")
    shard = model / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    tensors["transformer_blocks.1.attn1.to_q.weight"][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    output = tmp_path / "out"
    settings = ("--set", f"run.output={output}", "--set", f"model.folder={model}")
    finished = launch(2, "run", home / "recipe.toml", *settings).end()
    assert finished.code == 1
    assert finished.err.count("\n") == 1
    assert finished.err.endswith("its weight has NaN; mend the model, or skip the layer with model.skip.\n")
    finished = launch(2, "run", home / "recipe.toml", "--set", "run.outputs=x").end()
    assert finished.err.count("\n") == 1
    assert "run.outputs: unknown key 'outputs'" in finished.err


CALIBRATED = """
[calibration]
prompts = ["a small red ring", "a large blue square", "a ring on white", "a red square on black"]
parts = 4
threads = 1
cache = "{cache}"
[calibration.call]
num_inference_steps = 2
guidance_scale = 3.0
use_resolution_binning = false
clean_caption = false
height = 16
width = 16
[allocate]
budget = "6 bits"
[[allocate.choice]]
main_quantizer.weight = "int3"
[[allocate.choice]]
main_quantizer.weight = "int6"
"""


@pytest.mark.slow
def test_calibration_and_allocation_are_shared_out_for_the_same_bytes(
    home: Path, tmp_path: Path, launch: Callable[..., Launched]
) -> None:
    results = {}
    for name in ("one", "two"):
        recipe = models.write_recipe(
            tmp_path / f"{name}.toml",
            home / "model",
            tmp_path / name,
            extra=CALIBRATED.format(cache=tmp_path / f"cache-{name}"),
        )
        recipe.write_text(recipe.read_text().replace('strategy = "rtn"', 'strategy = "gptq"', 1))
        if name == "one":
            done(loraq("run", recipe))
        else:
            finished = launch(2, "run", recipe).end()
            assert finished.code == 0, finished.out
        cached = sorted((tmp_path / f"cache-{name}").rglob("*.safetensors"))
        results[name] = (
            models.tensor_files(tmp_path / name),
            {str(path.relative_to(tmp_path / f"cache-{name}")): path.read_bytes() for path in cached},
            json.loads((tmp_path / name / "loraq.json").read_text())["allocation"]["layers"],
        )
    assert results["one"][1]
    assert results["one"] == results["two"]
    assert not work_folder(tmp_path / "two").exists()


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces that see each other at 10.231.7.1 and 10.231.7.2, and nothing else."""
    names = (f"loraq-{os.getpid()}-a", f"loraq-{os.getpid()}-b")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", names[0], "link", "add", "wire0", "type", "veth", "peer", "name", "wire1", "netns", names[1])
            for place, name in enumerate(names):
                ip("-n", name, "address", "add", f"10.231.7.{place + 1}/24", "dev", f"wire{place}")
                ip("-n", name, "link", "set", f"wire{place}", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_machines_do_one_run(
    home: Path, tmp_path: Path, networks: tuple[str, str], launch: Callable[..., Launched]
) -> None:
    output = tmp_path / "out"
    running = []
    for place, name in enumerate(networks):
        where = ("--nnodes=2", "--nproc-per-node=1", f"--node-rank={place}")
        options = (*where, "--master-addr=10.231.7.1", "--master-port=29511")
        arguments = ("run", home / "recipe.toml", "--set", f"run.output={output}")
        running.append(launch(1, *arguments, options=options, before=("ip", "netns", "exec", name)))
    wait_for(lambda: (work_folder(output) / "journal.1.jsonl").exists() or output.exists(), running[0])
    for each in running:
        assert each.end().code == 0, each.log.read_text()
    assert models.tensor_files(output) == models.tensor_files(home / "plain")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert join().alone
    monkeypatch.setenv("WORLD_SIZE", "8")  # as cluster managers set it
    assert join().alone
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE is 'two' in the environment; start the processes by torchrun"):
        join()
