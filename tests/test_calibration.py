"""Calibration: what is collected, when, in how many passes; kept, added up, taken up again; and what is refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import models
from command import done, loraq, refused
from loraq import Calibration, collection, registry, samples
from loraq.calibration import bytes_of, open_prompts, passes, takes_argument
from loraq.collection import Collected, Collector
from loraq.contracts import AbstractCalibrated, AbstractFormat, AbstractQuantizer, AbstractStatistic
from loraq.errors import CheckpointError, InputError, LoraqError, ModelError, RecipeError
from loraq.input_statistics import ChannelMaxima, ChannelMeans, Gram, InputStatistics, TokenSample
from loraq.journal import work_folder
from loraq.layer import Coded, LayerContext
from loraq.linear import PackedLinear
from loraq.pipeline import Pipeline, make_stage
from loraq.recipe import load
from loraq.report import Report
from loraq.run import calibrate_recipe, run_recipe, try_layers
from loraq.statistics_cache import Cache, Layer
from matrices import seeded

ALL = frozenset({Gram, ChannelMaxima, ChannelMeans, TokenSample})
RTN: Any = registry.load("loraq.main_quantizer", "rtn")
STAGE: Any = registry.load("loraq.stage", "main_quantizer")
WIDTHS = (64, 256)
"""Input widths of the small pipeline's layers: nine a block, and the last feed-forward."""


@attrs.frozen(kw_only=True)
class Reading(AbstractQuantizer, AbstractCalibrated):
    """Rounds to nearest, and remembers for the test what it was told of each layer's input."""

    told: ClassVar[dict[str, InputStatistics]] = {}

    asks: frozenset[type[AbstractStatistic]] = ALL
    rtn: Any = attrs.field(factory=RTN)

    @property
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        return self.asks

    @property
    def format(self) -> AbstractFormat:
        return self.rtn.format

    @property
    def activation(self) -> Any:
        return self.rtn.activation

    def group_for(self, columns: int) -> int:
        return self.rtn.group_for(columns)

    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        self.told[context.name] = context.statistics
        return self.rtn.encode(weight, context)

    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        return self.rtn.round(weight, guess)


class Net(nn.Module):
    """A linear layer, a 1x1 convolution, one that is called by keyword, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.convolution = nn.Conv2d(8, 5, 1)
        self.last = nn.Linear(5, 3)
        self.idle = nn.Linear(5, 3)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(seeded(*parameter.shape, seed=seed))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input)
        pixels = self.convolution(hidden.permute(0, 2, 1)[..., None])
        return self.last(input=pixels[..., 0].permute(0, 2, 1))


def reading(*, asks: frozenset[type[AbstractStatistic]] = ALL, skip: tuple[str, ...] = ("idle",)) -> Pipeline:
    Reading.told.clear()
    return Pipeline([STAGE(strategy=Reading(asks=asks))], skip=skip, workers=1)


BATCHES = [seeded(2, 7, 6, seed=seed) for seed in range(4)]


def feed(module: nn.Module) -> Iterator[None]:
    """Runs the batches through the module, each as a prompt of its own."""
    for batch in BATCHES:
        module(batch)
        yield


def inputs_of(module: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """All tokens that each linear layer is given, stored plainly: what statistics must agree with."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv2d):

            def keep(child: nn.Module, arguments: Any, named: Any, name: str = name) -> None:
                input = arguments[0] if arguments else named["input"]
                last = input.permute(0, 2, 3, 1) if isinstance(child, nn.Conv2d) else input
                found.setdefault(name, []).append(last.detach().flatten(0, -2).clone())

            handles.append(child.register_forward_pre_hook(keep, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(tokens) for name, tokens in found.items()}


def check_statistics(found: InputStatistics, tokens: Tensor, size: int) -> None:
    """The statistics are those of `tokens`, computed plainly in float64."""
    exact = tokens.double()
    assert torch.allclose(found[Gram].mean.double(), exact.T @ exact / len(exact), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[ChannelMaxima].values, tokens.abs().amax(dim=0))
    assert torch.allclose(found[ChannelMeans].mean.double(), exact.abs().mean(dim=0), rtol=1e-5)
    sample = found[TokenSample].tokens
    assert len(sample) == min(size, len(tokens))
    assert all(bool((row == tokens).all(dim=1).any()) for row in sample)


def test_what_is_collected_agrees_with_the_stored_inputs() -> None:
    module = Net()
    stored = inputs_of(module, lambda: [module(batch) for batch in BATCHES])
    reading().quantize(module, calibrate=feed, sample=10)
    assert Reading.told.keys() == {"first", "convolution", "last"}
    for name, found in Reading.told.items():
        check_statistics(found, stored[name], 10)
    assert all(isinstance(each, PackedLinear) for each in (module.first, module.convolution, module.last))


def test_the_callable_may_take_nothing_and_runs_once_for_each_lot_of_layers() -> None:
    results = []
    for memory, runs in (("1 MB", 1), (900, 3)):
        module, called = Net(), 0

        def calibrate(module: nn.Module = module) -> None:
            nonlocal called
            called += 1
            for batch in BATCHES:
                module(batch)

        reading().quantize(module, calibrate=calibrate, sample=10, memory=memory)
        assert called == runs
        results.append((module.state_dict(), dict(Reading.told)))
    (tensors, told), (tensors_apart, told_apart) = results
    assert all(torch.equal(tensors[name], tensors_apart[name]) for name in tensors)
    for name in told:
        for kind in ALL:
            pairs = zip(attrs.astuple(told[name][kind]), attrs.astuple(told_apart[name][kind]), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), (name, kind)


def test_each_layer_collects_what_its_own_recipe_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = reading(asks=frozenset({Gram}))
    monkeypatch.setattr(Reading, "statistics", property(lambda self: self.asks if hooked else frozenset()))
    hooked = True
    pipeline.quantize(Net(), calibrate=feed)
    assert all(set(found.found) == {Gram} for found in Reading.told.values())
    hooked = False
    calls: list[int] = []
    pipeline.quantize(Net(), calibrate=lambda: calls.append(1))
    assert not calls, "nothing is asked for, nothing runs"


def test_hooks_are_gone_whatever_happens() -> None:
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def failing(module: nn.Module) -> None:
        module(BATCHES[0])
        assert any(child._forward_pre_hooks for child in module.modules())
        raise OSError("the data are gone")

    with pytest.raises(OSError, match="the data are gone"):
        reading().quantize(module, calibrate=failing)
    assert not any(child._forward_pre_hooks for child in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    reading().quantize(module, calibrate=feed)
    assert not any(child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinite value")])
def test_an_input_that_is_not_finite_is_refused_by_the_layers_name(value: float, word: str) -> None:
    module = Net()
    with torch.no_grad():
        module.convolution.weight[0, 0] = value
    bad = BATCHES[0].clone()
    with pytest.raises(ModelError, match=f"layer 'last': its input had {word} in calibration"):
        reading(skip=("idle", "convolution")).quantize(module, calibrate=lambda: module(bad))
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_in_python_a_callable_is_asked_for_and_a_layer_that_never_ran_is_named() -> None:
    module = Net()
    with pytest.raises(ModelError, match=r"Reading reads .*Gram.* of each layer's input; give `calibrate=`"):
        reading().quantize(module)
    with pytest.raises(ModelError, match=r"layer 'idle' never ran in calibration, .* model.skip, or give it"):
        reading(skip=()).quantize(module, calibrate=feed)
    with pytest.raises(InputError, match=r"calibration.memory: 100 bytes are too few, .* layer '.*' alone take"):
        reading().quantize(module, calibrate=feed, memory=100)
    assert not any(isinstance(child, PackedLinear) for child in module.modules())


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(9, 30))
def test_passes_hold_every_layer_once_and_never_too_much(sizes: list[int], limit: int) -> None:
    items = dict(enumerate(sizes))
    lots = passes(items, limit)
    assert sorted(item for lot in lots for item in lot) == sorted(items)
    assert all(0 < sum(items[item] for item in lot) <= limit for lot in lots)
    assert sum(sum(items[item] for item in lot) * 2 <= limit for lot in lots) <= 1, "two half-empty passes are one"


def test_sizes_of_memory_are_read_as_people_write_them() -> None:
    told = {"4 GiB": 2**32, "500MB": 5 * 10**8, "1.5 kB": 1500, "64": 64, 64: 64, "2 tib": 2**41}
    assert {text: bytes_of(text) for text in told} == told
    for text in ("", "4 GX", "-1", "0", "GiB", "four"):
        with pytest.raises(InputError, match="'memory' must be a number of bytes"):
            bytes_of(text)


def test_who_takes_an_argument() -> None:
    assert takes_argument(lambda pipeline: 0)
    assert takes_argument(feed)
    assert not takes_argument(lambda: 0)
    assert not takes_argument(lambda pipeline=None: 0)
    assert not takes_argument(lambda *, pipeline=None: 0)
    assert takes_argument(Net().forward)


# --- whole pipelines -------------------------------------------------------------------------------------------------


PROMPTS = ("a small red ring", "a large blue square", "a red square on white", "a ring on black", "not taken")


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Each calibration lets its pipeline go; what is there before need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline of one block, never written to."""
    return models.saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline", layers=1)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """GPTQ after a rotation, four prompts from a file, the cache beside it."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n" + "\n".join(PROMPTS[2:]))
    call = ", ".join(f"{name} = {json.dumps(value)}" for name, value in models.CALL.items())
    extra = f"""
[calibration]
prompts = "prompts.txt"
count = 4
sample = 20
threads = 1
cache = "{tmp_path}/cache"
call = {{ {call} }}
"""
    path = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out", extra=extra)
    path.write_text(path.read_text().replace('kind = "main_quantizer"\nstrategy = "rtn"', CALIBRATED))
    return path


CALIBRATED = 'kind = "main_quantizer"\nstrategy = "gptq"'


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the pipelines that were loaded, each time one was."""
    found: list[Path] = []
    load_pipeline = samples.load_pipeline

    def noted(folder: Path, *arguments: Any) -> Any:
        found.append(folder)
        return load_pipeline(folder, *arguments)

    monkeypatch.setattr(samples, "load_pipeline", noted)
    return found


def run(recipe: Path, *settings: str, restart: bool = False) -> Report:
    return run_recipe(load(recipe, settings), restart=restart)


def calibrate(recipe: Path, *settings: str, part: int | None = None) -> Collected:
    found = calibrate_recipe(load(recipe, settings), part)
    assert found is not None
    return found


def kept(folder: Path) -> dict[str, bytes]:
    """What a cache holds, by path below the fingerprint."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_the_real_pipeline_runs_through_all_steps_and_the_rest_is_as_without(
    recipe: Path, model: Path, tmp_path: Path, loaded: list[Path]
) -> None:
    report = run(recipe)
    assert loaded == [model]
    assert len(report.layers) == 10
    assert all(layer.output_error_after is not None for layer in report.layers)
    provenance = json.loads((tmp_path / "out" / "loraq.json").read_text())
    assert provenance["recipe"]["calibration"]["prompts"] == str(tmp_path / "prompts.txt")
    assert provenance["fingerprint"]["calibration"]["settings"]["count"] == 4
    assert run(recipe).already_done
    again = run(recipe, f"run.output={tmp_path / 'again'}")
    assert loaded == [model], "all was in the cache"
    assert models.tensor_files(tmp_path / "again") == models.tensor_files(tmp_path / "out")
    assert [each.error_after for each in again.layers] == [each.error_after for each in report.layers]
    assert models.tensor_files(tmp_path / "out")
    # The same, by hand: a picture of each prompt, every step, every token.
    pipeline = samples.load_pipeline(model, torch.device("cpu"))

    def drawn() -> None:
        for place, prompt in enumerate(PROMPTS[:4]):
            pipeline(prompt, generator=torch.Generator().manual_seed(place), **models.CALL)

    torch.set_num_threads(1)
    stored = inputs_of(pipeline.transformer, drawn)
    (folder,) = (tmp_path / "cache").iterdir()
    for layer in report.layers:
        file = load_file(Cache(folder, 1).path(0, Layer("transformer", layer.name, layer.inn), Gram))
        tokens = stored[layer.name].double()
        assert int(file["count"]) == len(tokens)
        assert torch.allclose(file["sums"].double(), tokens.T @ tokens, rtol=1e-4, atol=1e-4 * len(tokens))


def test_batches_of_layers_give_the_same_bytes_as_one_pass(recipe: Path, tmp_path: Path, loaded: list[Path]) -> None:
    one = calibrate(recipe)
    at_once = kept(Path(one.folder))
    shutil.rmtree(one.folder)
    settings = ["calibration.memory=263000"]
    plan = json.loads(done(loraq("plan", recipe, "--set", settings[0], "--json")))["calibration"]
    apart = calibrate(recipe, *settings)
    assert (one.passes, apart.passes) == (1, plan["passes"])
    assert plan["passes"] > 1
    assert plan["memory"] <= 263000
    assert apart.bytes == plan["bytes"] == one.bytes
    assert apart.folder == one.folder
    assert kept(Path(apart.folder)) == at_once
    assert len(at_once) == 10
    assert len(loaded) == 2, "the pipeline is loaded once for all passes"


def test_parts_may_be_collected_by_whom_and_in_what_order_ever(recipe: Path, tmp_path: Path) -> None:
    settings = ["calibration.parts=3", "pre_transform.strategy=none"]
    run(recipe, *settings)
    together = models.tensor_files(tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    for part in (2, 0):
        assert calibrate(recipe, *settings, part=part).passes == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(each.name for each in folder.iterdir()) == ["1-of-3", "3-of-3"]
    assert calibrate(recipe, *settings).passes == 1, "the part that nobody collected"
    run(recipe, *settings, restart=True)
    assert models.tensor_files(tmp_path / "out") == together


def test_parts_add_up_to_the_whole(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gptq: Any = registry.load("loraq.main_quantizer", "gptq")
    monkeypatch.setattr(gptq, "statistics", property(lambda self: ALL))
    found = {}
    for parts in (1, 4):
        cache = Cache(Path(calibrate(recipe, f"calibration.parts={parts}").folder), parts)
        layer = Layer("transformer", "transformer_blocks.0.attn1.to_q", 64)
        found[parts] = InputStatistics({kind: cache.read(layer, kind, torch.device("cpu")) for kind in ALL})
    whole, split = found[1], found[4]
    assert torch.equal(whole[TokenSample].tokens, split[TokenSample].tokens), "the same tokens"
    assert torch.equal(whole[ChannelMaxima].values, split[ChannelMaxima].values)
    assert float(whole[Gram].count) == float(split[Gram].count)
    assert torch.allclose(whole[Gram].sums, split[Gram].sums, rtol=1e-5, atol=1e-3)
    assert torch.allclose(whole[ChannelMeans].sums, split[ChannelMeans].sums, rtol=1e-12)


def test_a_spoilt_cache_is_collected_anew_and_only_what_is_spoilt(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(calibrate(recipe).folder)
    whole = kept(folder)
    truncated, flipped, gone = list(whole)[:3]
    (folder / truncated).write_bytes(whole[truncated][:-40])
    data = bytearray(whole[flipped])
    data[-5] ^= 1
    (folder / flipped).write_bytes(data)
    (folder / gone).unlink()
    left, being_written = folder / ".left.1.partial", folder / ".writing.2.partial"
    for partial, age in ((left, 4000), (being_written, 0)):
        partial.write_bytes(b"")
        os.utime(partial, (time.time() - age,) * 2)
    collected: list[Layer] = []
    entered = Collector.__enter__

    def noted(self: Collector) -> Collector:
        collected.extend(self.found)
        return entered(self)

    monkeypatch.setattr(Collector, "__enter__", noted)
    assert calibrate(recipe).passes == 1
    assert len(collected) == 3
    assert not left.exists()
    assert being_written.exists()
    assert kept(folder) == whole
    assert calibrate(recipe).passes == 0


@pytest.mark.parametrize("kind", sorted(ALL, key=str))
@pytest.mark.parametrize("counts", [(3, 9), (0, 5), (5, 0), (0, 0)])
def test_what_is_kept_is_read_back_and_added_up(
    kind: type[AbstractStatistic], counts: tuple[int, int], tmp_path: Path
) -> None:
    cache, layer = Cache(tmp_path, 2), Layer("transformer", "a/../b.c", 6)
    found = []
    for part, count in enumerate(counts):
        tokens = seeded(count, 6, seed=part)
        statistic = kind.empty(6, "cpu", sample=4).observed(tokens, torch.Generator().manual_seed(part))
        cache.write(part, layer, statistic, count)
        found.append(statistic)
        assert cache.tokens(part, layer, kind) == Cache(tmp_path, 2).tokens(part, layer, kind) == count
    expected = found[0].merged(found[1])
    read = Cache(tmp_path, 2).read(layer, kind, torch.device("cpu"))
    assert all(map(torch.equal, attrs.astuple(read), attrs.astuple(expected)))
    assert all(tmp_path in path.resolve().parents for path in tmp_path.rglob("*")), "no name leads out of the folder"
    cache.path(0, layer, kind).unlink()
    with pytest.raises(CheckpointError, match=r"layer 'a/../b.c''s statistics cannot be read"):
        cache.read(layer, kind, torch.device("cpu"))


def test_a_device_without_memory_is_told_in_a_sentence(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(Collector, "_observe", full)
    with pytest.raises(LoraqError, match=r"calibration.memory: cpu ran out of memory .* set it lower"):
        calibrate(recipe)


class StoppedError(Exception):
    """Stands for a kill within this process."""


def test_killed_in_a_pass_it_loses_that_pass_alone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["calibration.memory=263000"]
    begun = 0
    entered = Collector.__enter__

    def stops(self: Collector) -> Collector:
        nonlocal begun
        begun += 1
        if begun == 2:
            raise StoppedError
        return entered(self)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "__enter__", stops)
        with pytest.raises(StoppedError):
            run(recipe, *settings)
        finished = kept(next((tmp_path / "cache").iterdir()))
        assert finished
        assert work_folder(tmp_path / "out").exists()
        run(recipe, *settings)
    total = begun - 1
    now = kept(next((tmp_path / "cache").iterdir()))
    assert {name: now[name] for name in finished} == finished
    stopped = models.tensor_files(tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    run(recipe, *settings, f"run.output={tmp_path / 'undisturbed'}")
    assert models.tensor_files(tmp_path / "undisturbed") == stopped
    plan = json.loads(done(loraq("plan", recipe, "--set", settings[0], "--json")))
    assert plan["calibration"]["passes"] == total, "no pass was repeated but the one in flight"


def test_without_a_cache_nothing_is_left_and_the_result_is_the_same(recipe: Path, tmp_path: Path) -> None:
    run(recipe)
    expected = models.tensor_files(tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    run(recipe, "calibration.cache=false", restart=True)
    assert models.tensor_files(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt", "recipe.toml"]
    report = try_layers(load(recipe, ["calibration.cache=false"]), "*.to_q")
    assert len(report.layers) == 2
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match=r"calibration.cache: is false, so nothing would be kept"):
        calibrate(recipe, "calibration.cache=false")


def test_the_default_cache_is_the_users(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert (
        Path(calibrate(recipe, "calibration.cache=true").folder).parent == tmp_path / "home" / "loraq" / "calibration"
    )


def test_trying_some_layers_calibrates_only_those(recipe: Path, tmp_path: Path) -> None:
    report = try_layers(load(recipe), "*.to_q")
    assert len(report.layers) == 2
    assert len(kept(tmp_path / "cache")) == 2
    (whole,) = {run(recipe).layers}
    assert {each.name: each.error_after for each in report.layers}.items() <= {
        each.name: each.error_after for each in whole
    }.items()


def test_a_data_free_recipe_never_calibrates(recipe: Path, tmp_path: Path, loaded: list[Path]) -> None:
    settings = ["main_quantizer.strategy=rtn", "calibration.prompts=nowhere.txt"]
    run(recipe, *settings)
    assert not loaded
    assert set(json.loads((tmp_path / "out" / "loraq.json").read_text())["fingerprint"]) == {
        "recipe",
        "model",
        "versions",
        "device",
    }
    told = done(loraq("calibrate", recipe, *[word for each in settings for word in ("--set", each)]))
    assert "there is nothing to calibrate" in told
    assert json.loads(done(loraq("plan", recipe, "--set", settings[0], "--json")))["calibration"] is None
    assert not (tmp_path / "cache").exists()


def test_changed_prompts_do_not_mix_with_an_unfinished_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe)
    (tmp_path / "prompts.txt").write_text("a white square")
    with pytest.raises(InputError, match="was made with another calibration"):
        run(recipe)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:4]))
    assert run(recipe).already_done, "it is the prompts that count, not the file"


SOURCES = f"""
import torch

def gives():
    yield from {PROMPTS!r}

def runs(pipeline):
    for place, prompt in enumerate({PROMPTS!r}):
        pipeline(prompt, generator=torch.Generator().manual_seed(place), output_type="latent", **{models.CALL!r})
        yield

def fails():
    raise ValueError("no data today")

def fails_to_run(pipeline):
    raise ValueError("no data today")

def numbers():
    return [1, 2]

nothing = 3
"""


def test_prompts_come_from_a_file_an_array_or_a_callable(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt_source.py").write_text(SOURCES)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = calibrate(recipe)
    for source in (json.dumps(PROMPTS), "prompt_source:gives", "prompt_source.py:gives"):
        found = calibrate(recipe, f"calibration.prompts={source}")
        assert (found.folder, found.passes) == (expected.folder, 0), source
    for source in ("prompt_source:runs", "prompt_source.py:runs"):
        found = calibrate(recipe, f"calibration.prompts={source}")
        assert found.folder != expected.folder
        assert kept(Path(found.folder)) == kept(Path(expected.folder)), "the same prompts, run by the callable"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["prompts=nowhere.txt"], "calibration.prompts: .*nowhere.txt cannot be read: .*No such file"),
        (["prompts=empty.txt"], "calibration.prompts: .*empty.txt is empty; write a prompt a line"),
        (["prompts=no_such_module:prompts"], "no_such_module:prompts cannot be imported: ModuleNotFoundError"),
        (["prompts=source.py:missing"], "calibration.prompts: .*source.py has no callable 'missing'"),
        (["prompts=source.py:nothing"], "calibration.prompts: .*source.py has no callable 'nothing'"),
        (["prompts=source.py:fails"], "calibration.prompts: .*source.py:fails failed: ValueError: no data today"),
        (["prompts=source.py:fails_to_run"], "calibration.prompts: .* failed: ValueError: no data today"),
        (["prompts=source.py:numbers"], "calibration.prompts: .* gave 1, which is no text"),
        (["prompts=source.py:runs", "parts=2"], "calibration.parts: .* runs the pipeline itself and cannot be split"),
        (["parts=7", "count=9"], "calibration.prompts: 5 prompts make no 7 parts"),
        (["call.hight=16"], "calibration.call: PixArtSigmaPipeline takes no 'hight'; did you mean 'height'"),
        (["call.height=17"], "calibration.call: PixArtSigmaPipeline does not take it: "),
        (["memory=1 kB"], "calibration.memory: 1,000 bytes are too few, .* set it to 1 MiB or more"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing_in_the_way(
    recipe: Path, tmp_path: Path, settings: list[str], sentence: str
) -> None:
    (tmp_path / "source.py").write_text(SOURCES)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match=sentence):
        run(recipe, *(f"calibration.{each}" for each in settings))
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("prompts=[]", "calibration: 'prompts' is empty"),
        ("prompts=3", "calibration.prompts: expected a string or "),
        ("prompts=[1]", "calibration.prompts: expected a string or an array of strings"),
        ("count=0", "calibration: 'count' must be >= 1"),
        ("memory=lots", "calibration: 'memory' must be a number of bytes"),
        ("parts=5", "calibration: 'parts' is 5 for at most 4 prompts"),
        ("cache=''", "calibration: 'cache' must be a folder's path, true or false"),
        ("promts=a", "calibration.promts: unknown key 'promts'"),
        ("call=3", "calibration.call: expected a table, got 3"),
    ],
)
def test_settings_are_judged(recipe: Path, setting: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as found:
        load(recipe, [f"calibration.{setting}"])
    assert any(sentence in fault for fault in found.value.faults), found.value.faults


def test_a_recipe_that_needs_calibration_and_has_none_is_refused_at_check(recipe: Path, model: Path) -> None:
    text = recipe.read_text().partition("[calibration]")[0]
    recipe.write_text(text)
    needed = "calibration: is missing, and main_quantizer gptq reads Gram of each layer's input; add a section"
    assert needed in refused(loraq("check", recipe))
    data_free = text.replace('strategy = "gptq"', 'strategy = "rtn"')
    recipe.write_text(data_free)
    done(loraq("check", recipe))
    recipe.write_text(data_free + '[[layers]]\nmatch = "*.to_q"\nmain_quantizer.strategy = "gptq"\n')
    assert needed in refused(loraq("check", recipe))
    with pytest.raises(InputError, match="main_quantizer gptq reads Gram"):
        Pipeline([make_stage("main_quantizer", "gptq")]).run(model, recipe.parent / "out")


def test_prompts_need_a_whole_pipeline(recipe: Path, model: Path) -> None:
    told = refused(loraq("run", recipe, "--set", f"model.folder={model / 'transformer'}"))
    assert "is a lone component, but [calibration] runs prompts" in told
    assert "Pipeline.quantize(module, calibrate=" in told


def test_python_calibrates_as_the_recipe_does(recipe: Path, model: Path, tmp_path: Path) -> None:
    run(recipe)
    stages = load(recipe).stage
    calibration = Calibration(
        prompts=list(PROMPTS), count=4, sample=20, threads=1, call=models.CALL, cache=str(tmp_path / "other")
    )
    Pipeline(stages).run(model, tmp_path / "python", calibration=calibration)
    assert models.tensor_files(tmp_path / "python") == models.tensor_files(tmp_path / "out")


def test_the_command_collects_a_part(recipe: Path, tmp_path: Path) -> None:
    parts = ("--set", "calibration.parts=2")
    assert "there is no such part" in refused(loraq("calibrate", recipe, *parts, "--part", 3))
    told = done(loraq("calibrate", recipe, *parts, "--part", 2))
    assert "10 layers' inputs; 1 pass over the prompts" in told
    found = json.loads(done(loraq("calibrate", recipe, *parts, "--json")))
    assert found["passes"] == 1
    assert "all was there already" in done(loraq("calibrate", recipe, *parts))
    assert "calibration: at most 4 prompts in 2 parts, 2 passes for" in done(loraq("plan", recipe, *parts))


def test_no_room_is_told_before_anything_runs(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(collection.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(
        InputError, match=r"calibration.cache: .* needs .* bytes for statistics, but its disk has 1,000"
    ):
        calibrate(recipe)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"calibration.cache: .* cannot be written"):
        calibrate(recipe, f"calibration.cache={tmp_path / 'file'}")
    assert not loaded


def test_prompts_are_split_without_gap_or_overlap() -> None:
    texts = tuple(map(str, range(11)))
    for parts in range(1, 12):
        prompts = open_prompts(Calibration(prompts=texts, parts=parts))
        lots = [prompts.part(number, parts) for number in range(parts)]
        assert [place for lot in lots for place in lot] == list(range(11))
        assert all(lots)
