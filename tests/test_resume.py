"""Nothing lost: killed at any moment, a run continues, and its result is that of a run that was never disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

import models
from command import Forker, done, loraq, refused
from loraq import fitting
from loraq import run as run_module
from loraq.errors import CheckpointError
from loraq.journal import Journal, work_folder
from loraq.recipe import load
from loraq.run import run_recipe

SHARD = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline", layers=4)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_recipe(load(models.write_recipe(folder / "recipe.toml", model, folder / "out")))
    return models.tensor_files(folder / "out")


def lines(output: Path) -> list[dict[str, Any]]:
    """The journal's whole lines, without the fingerprint."""
    path = work_folder(output) / "journal.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]


@pytest.fixture
def slow_recipe(model: Path, tmp_path: Path) -> Path:
    """A recipe whose fits take a while."""
    path = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out", low_rank="loraq")
    path.write_text(path.read_text().replace("rank = 4", "rank = 4\nsteps = 20"))
    return path


@pytest.fixture
def undisturbed_slow(slow_recipe: Path, tmp_path: Path) -> dict[str, bytes]:
    """The result of a run of it that nothing disturbed."""
    run_recipe(load(slow_recipe, [f"run.output={tmp_path / 'fresh'}"]))
    return models.tensor_files(tmp_path / "fresh")


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    made = Forker(tmp_path_factory.mktemp("forker") / "log")
    yield made
    made.close()


def wait_for(condition: Callable[[], bool], forker: Forker) -> None:
    deadline = time.monotonic() + 60
    while not condition() and forker.running and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_fifty_moments_of_chance_it_ends_each_time_as_if_undisturbed(
    model: Path, undisturbed_slow: dict[str, bytes], slow_recipe: Path, forker: Forker
) -> None:
    output, recipe = slow_recipe.parent / "out", slow_recipe
    chance = random.Random(0)
    seen: list[str] = []
    finished = 0
    for _ in range(50):
        # Some layers later or none, at a moment of chance; often within the start or the end.
        target = len(seen) + chance.choice([0, 0, 1, 3, 8])
        forker.start("run", recipe)
        wait_for(lambda target=target: len(lines(output)) >= target, forker)  # type: ignore[misc]
        time.sleep(chance.random() * 0.15)
        code = forker.end(signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), forker.log.read_text()
        now = [line["unit"] for line in lines(output)]
        assert len(set(now)) == len(now), "no unit is done twice"
        if output.exists():  # killed after the last rename, or too late
            assert models.tensor_files(output) == undisturbed_slow
            done(loraq("run", recipe))
            assert not work_folder(output).exists(), "nothing is left behind"
            shutil.rmtree(output)
            finished += 1
            now = []
        else:
            assert now[: len(seen)] == seen, "what is done stays done"
        seen = now
    assert finished, "some runs came to their end"
    forker.start("run", recipe)
    assert forker.end() == 0, forker.log.read_text()
    assert models.tensor_files(output) == undisturbed_slow


class StoppedError(Exception):
    """Stands for a kill within this process."""


def stopped(recipe: Path, monkeypatch: pytest.MonkeyPatch, after: int, output: Path | None = None) -> list[str]:
    """Run until so many units are done. Returns them."""
    add = Journal.add

    def counted(self: Journal, unit: str, digest: str, record: Any) -> None:
        if len(self.entries) == after:
            raise StoppedError
        add(self, unit, digest, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(StoppedError):
            run_recipe(load(recipe, ["run.workers=1"]))
    return [line["unit"] for line in lines(output or recipe.parent / "out")]


def fitted(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run to the end. Returns the names of the layers that were fitted."""
    names: list[str] = []
    quantize_group = fitting.quantize_group

    def noted(weights: Mapping[str, Tensor], *arguments: Any, **options: Any) -> Any:
        names.extend(weights)
        return quantize_group(weights, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "quantize_group", noted)
        run_recipe(load(recipe))
    return names


def test_no_finished_layer_is_fitted_twice(
    recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stopped(recipe, monkeypatch, after=9)
    second = stopped(recipe, monkeypatch, after=20)
    assert second[:9] == first
    assert len(set(second)) == 20
    rest = fitted(recipe, monkeypatch)
    assert len(rest) == 21
    assert {f"transformer:{name}" for name in rest} & set(second) == set()
    assert models.tensor_files(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_journal_line_that_was_cut_off_is_dropped(
    cut: int, recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = stopped(recipe, monkeypatch, after=6)
    path = work_folder(tmp_path / "out") / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = fitted(recipe, monkeypatch)
    assert len(again) == 40 - 4, "the last of five layers is done once more"
    assert units[-1].removeprefix("transformer:") in again
    assert models.tensor_files(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff\n", b"[]\n", b'{"a": 1}\n{"unit": "x"}\n', b"3\n4\n"])
def test_a_spoilt_journal_makes_a_new_start_or_is_refused(
    content: bytes, recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(recipe, monkeypatch, after=3)
    (work_folder(tmp_path / "out") / "journal.jsonl").write_bytes(content)
    if content.startswith(b'{"a"'):
        with pytest.raises(CheckpointError, match="holds an unfinished run with another device, model, recipe, ver"):
            run_recipe(load(recipe))
        run_recipe(load(recipe), restart=True)
    else:
        assert len(fitted(recipe, monkeypatch)) == 40
    assert models.tensor_files(tmp_path / "out") == undisturbed


def test_a_flipped_byte_is_noticed_and_that_layer_made_again(
    recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = stopped(recipe, monkeypatch, after=8)
    plan = run_module.make_plan(run_module.open_source(load(recipe).model), load(recipe).pipeline())
    victim = units[3].removeprefix("transformer:")
    start, _ = plan.components[0].files[0].places[f"{victim}.main.codes"]
    partial = work_folder(tmp_path / "out") / "result" / f"{SHARD}.partial"
    with partial.open("r+b") as file:
        file.seek(start)
        (octet,) = file.read(1)
        file.seek(start)
        file.write(bytes([octet ^ 1]))
    again = fitted(recipe, monkeypatch)
    assert victim in again
    assert len(again) == 40 - 7 + 1
    assert models.tensor_files(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("spoil", ["lost", "cut off", "longer", "zeros", "garbage"])
def test_a_partial_file_that_is_spoilt_is_mended(
    spoil: str, recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(recipe, monkeypatch, after=8)
    partial = work_folder(tmp_path / "out") / "result" / f"{SHARD}.partial"
    content = partial.read_bytes()
    if spoil == "lost":
        partial.unlink()
    elif spoil == "longer":
        partial.write_bytes(content + b"x" * 5000)
    else:
        kept = content[: len(content) // 2]
        rest = {"cut off": b"", "zeros": bytes(len(kept)), "garbage": random.Random(0).randbytes(len(kept))}[spoil]
        partial.write_bytes(kept + rest)
    again = len(fitted(recipe, monkeypatch))
    assert again == {"lost": 40, "longer": 33}.get(spoil, again)
    assert 33 <= again <= 40
    assert models.tensor_files(tmp_path / "out") == undisturbed


def test_garbage_within_the_journal_costs_only_what_it_hit(
    recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = stopped(recipe, monkeypatch, after=9)
    path = work_folder(tmp_path / "out") / "journal.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    content[3] = b"\x00\xff\xfe garbage \r of a disk\n"
    content[5] = content[5].replace(b'"out"', b'"ouch"')  # a record that is none
    content[6] = content[6].replace(b'"unit": "', b'"unit": 3, "was": "')
    content[7] = b"[" * 5000 + b"\n"
    path.write_bytes(b"".join(content))
    again = fitted(recipe, monkeypatch)
    lost = {units[place - 1].removeprefix("transformer:") for place in (3, 5, 6, 7)}
    assert set(again) & {unit.removeprefix("transformer:") for unit in units} == lost
    assert len(again) == 40 - 8 + 4
    assert models.tensor_files(tmp_path / "out") == undisturbed


def test_what_other_processes_journaled_is_taken_up_once(
    recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = stopped(recipe, monkeypatch, after=9)
    first = work_folder(tmp_path / "out") / "journal.jsonl"
    content = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join(content[:5]))
    others = [first.with_name(f"journal.{number}.jsonl") for number in (1, 2, 3)]
    others[0].write_bytes(b"".join([content[0], *content[4:8]]))  # one line is in both
    others[1].write_bytes(content[0] + content[8] + content[9][:50])  # killed while it wrote
    others[2].write_bytes(b'{"recipe": "another"}\n' + content[9])
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "in_parallel", lambda *arguments, **options: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            run_recipe(load(recipe))
    assert [line["unit"] for line in lines(tmp_path / "out")] == units[:8]
    assert not any(path.exists() for path in others)
    assert len(fitted(recipe, monkeypatch)) == 40 - 7
    assert models.tensor_files(tmp_path / "out") == undisturbed


def test_a_process_of_another_run_that_is_still_at_work_is_noticed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(recipe, monkeypatch, after=3)
    fingerprint = json.loads((work_folder(tmp_path / "out") / "journal.jsonl").read_text().splitlines()[0])
    with Journal(tmp_path / "out", fingerprint, number=1):  # whose first process was killed
        for options in ((), ("--restart",)):
            message = refused(loraq("run", recipe, *options))
            assert message.endswith("out.unfinished: another run is at work on this output; wait for it.\n")
    done(loraq("run", recipe))


@pytest.mark.parametrize("changed", ["weights", "config.json"])
def test_a_model_that_changed_in_between_is_refused(
    changed: str, recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.copy_of(model, tmp_path / "model")
    recipe.write_text(recipe.read_text().replace(str(model), str(folder)))
    stopped(recipe, monkeypatch, after=5)
    before = models.tensor_files(folder)
    if changed == "weights":
        shard = folder / SHARD
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        config = folder / "transformer" / "config.json"
        config.write_text(config.read_text().replace("{", '{"remark": "new",', 1))
    sentence = refused(loraq("run", recipe))
    assert sentence == (
        f"error: {work_folder(tmp_path / 'out')} holds an unfinished run with another model; run that one to its end, "
        "choose another run.output, or discard it with --restart.\n"
    )
    for path, content in before.items():
        (folder / path).write_bytes(content)
    assert len(fitted(recipe, monkeypatch)) == 40 - 4


@pytest.mark.parametrize(
    "moment", ["_write_rest", "copytree", "sync_tree", "Journal.finish", "Path.rename", "shutil.rmtree"]
)
def test_stopped_near_the_end_it_continues(
    moment: str, recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise StoppedError

    def half_copied(source: Path, target: Path, **options: object) -> None:
        target.mkdir(exist_ok=True)
        (target / next(source.iterdir()).name).write_text("{")
        raise StoppedError

    with monkeypatch.context() as patch:
        if moment == "Journal.finish":
            patch.setattr(Journal, "finish", stop)
        elif moment == "Path.rename":  # within finish, before the result has its name
            patch.setattr(Path, "rename", lambda self, to: stop() if self.name == "result" else os.rename(self, to))
        elif moment == "shutil.rmtree":  # within finish, after it
            patch.setattr("loraq.journal.shutil.rmtree", stop)
        elif moment == "copytree":
            patch.setattr("loraq.run.shutil.copytree", half_copied)
        else:
            patch.setattr(run_module, moment, stop)
        with pytest.raises(StoppedError):
            run_recipe(load(recipe))
    assert (tmp_path / "out").exists() == (moment == "shutil.rmtree")
    assert fitted(recipe, monkeypatch) == []
    assert models.tensor_files(tmp_path / "out") == undisturbed
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.slow
def test_a_second_run_on_the_same_output_is_refused(model: Path, tmp_path: Path, forker: Forker) -> None:
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out", low_rank="loraq")
    recipe.write_text(recipe.read_text().replace("rank = 4", "rank = 4\nsteps = 1000000"))
    forker.start("run", recipe)
    wait_for(lambda: len(lines(tmp_path / "out")) >= 1, forker)
    sentence = f"error: {tmp_path / 'out.unfinished'}: another run is at work on this output; wait for it.\n"
    assert refused(loraq("run", recipe)) == sentence
    assert refused(loraq("run", recipe, "--restart")) == sentence
    assert forker.running, "the first run is left alone"
    assert forker.end(signal.SIGINT) == 1
    assert forker.log.read_text().strip() == "interrupted; the same command continues where it stopped"


def test_a_file_that_may_not_grow_is_told(recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    partial = tmp_path / "out.unfinished" / "result" / f"{SHARD}.partial"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        sentence = refused(loraq("run", recipe))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sentence.startswith(f"error: {partial}: there is no room for ")
    assert sentence.endswith(" bytes (File too large); free some, or set run.output to another disk.\n")
    assert not (tmp_path / "out").exists()
    done(loraq("run", recipe))
    assert models.tensor_files(tmp_path / "out") == undisturbed


def test_a_disk_that_fills_up_is_told_and_the_same_command_continues(
    recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count == 12 and data.startswith(b'{"unit"'):
            write(descriptor, data[:30])  # a torn line
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr("loraq.journal.os.write", full)
        sentence = refused(loraq("run", recipe))
    work = work_folder(tmp_path / "out")
    assert sentence == (
        f"error: run.output: {work} cannot be written (No space left on device); mend that, and the same command "
        "continues.\n"
    )
    assert (work / "journal.jsonl").read_text().endswith("\n"), "no torn line stays"
    assert len(fitted(recipe, monkeypatch)) <= 31
    assert models.tensor_files(tmp_path / "out") == undisturbed


def test_a_full_small_disk_is_told(recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        settings = ("--set", f"run.output={disk / 'out'}")
        sentence = refused(loraq("run", recipe, *settings))
        assert sentence.startswith(f"error: run.output: {disk / 'out.unfinished'} needs ")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        done(loraq("run", recipe, *settings))
        assert models.tensor_files(disk / "out") == undisturbed
        message = refused(loraq("run", recipe, "--set", f"run.output={disk}", "--restart"))
        assert "is not empty" in message or "is a mount point" in message
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_another_fills_meanwhile_is_told_and_with_room_it_continues(
    slow_recipe: Path, undisturbed_slow: dict[str, bytes], disk: Path, forker: Forker
) -> None:
    output = disk / "out"
    setting = f"run.output={output}"
    forker.start("run", slow_recipe, "--set", setting)
    wait_for(lambda: len(lines(output)) >= 3, forker)
    with (disk / "big").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 1000)
    assert forker.end() == 2
    assert forker.log.read_text() == (
        f"error: run.output: {work_folder(output)} cannot be written (No space left on device); mend that, and the "
        "same command continues.\n"
    )
    before = [line["unit"] for line in lines(output)]
    assert len(before) >= 3
    (disk / "big").unlink()
    done(loraq("run", slow_recipe, "--set", setting))
    assert models.tensor_files(output) == undisturbed_slow


def test_a_disk_that_is_read_only_is_told_and_once_it_is_not_the_run_continues(
    recipe: Path, undisturbed: dict[str, bytes], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = disk / "out"
    recipe.write_text(recipe.read_text().replace(str(recipe.parent / "out"), str(output)))

    def mounted(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

    told = f"error: run.output: {work_folder(output)} cannot be written (Read-only file system).\n"
    mounted("ro")
    assert refused(loraq("run", recipe)) == told
    mounted("rw")
    stopped(recipe, monkeypatch, after=9, output=output)
    mounted("ro")
    assert refused(loraq("run", recipe)) == told
    mounted("rw")
    assert len(fitted(recipe, monkeypatch)) == 40 - 8
    assert models.tensor_files(output) == undisturbed
    mounted("ro")
    assert run_recipe(load(recipe)).already_done
    mounted("rw")


def test_a_folder_that_may_not_be_written_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere; the system's answer to others is played
        mkdir = Path.mkdir

        def denied(self: Path, *arguments: Any, **options: Any) -> None:
            if locked in self.parents:
                raise PermissionError(13, "Permission denied")
            mkdir(self, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", denied)
    sentence = refused(loraq("run", recipe, "--set", f"run.output={locked / 'out'}"))
    assert sentence == f"error: run.output: {locked / 'out.unfinished'} cannot be written (Permission denied).\n"


def test_nothing_stays_open_after_a_failed_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(load(recipe, [f"run.output={recipe.parent / 'warm'}"]))
    before = {file.path for file in psutil.Process().open_files()}
    stopped(recipe, monkeypatch, after=3)
    assert {file.path for file in psutil.Process().open_files()} <= before
