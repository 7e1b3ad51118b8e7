"""What `plan` says of memory and time: measured by fitting small layers, kept; honest where nothing was measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from command import done, loraq
from loraq import estimate as estimates
from loraq.calibration import Calibration
from loraq.estimate import Probe, Shape, work_of
from loraq.pipeline import Pipeline, make_stage
from loraq.plan import make_plan
from loraq.recipe import ModelSource
from loraq.source import open_source
from loraq.workers import Workers


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(estimates, "GRANTED", 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline, never written to."""
    return models.saved_pipeline(tmp_path_factory.mktemp("estimated") / "pipeline")


def stages(low_rank: str = "svd", main: str = "rtn", **options: Any) -> list[Any]:
    rank = {} if low_rank == "none" else {"rank": 4}
    return [
        make_stage("main_quantizer", main),
        make_stage("low_rank", low_rank, **rank, **options),
        make_stage("branch_quantizer", "rtn"),
    ]


shapes = st.builds(lambda out, inn: Shape((out,), inn), st.integers(64, 4096), st.integers(64, 4096))


@given(
    st.lists(shapes, min_size=3, max_size=6, unique=True),
    st.tuples(*[st.floats(0.1, 10)] * 3),
    shapes,
)
def test_the_law_is_found_where_it_holds(known: list[Shape], factors: tuple[float, ...], asked: Shape) -> None:
    """Interpolated within a few percent; extrapolated never below what was measured of a smaller layer."""
    truth = [factor / scale for factor, scale in zip(factors, (1e2, 1e7, 1e10), strict=True)]

    def seconds(shape: Shape) -> float:
        return truth[0] + truth[1] * shape.weights + truth[2] * shape.cost

    probes = [Probe(shape, seconds(shape)) for shape in known]
    for shape in known:
        assert estimates._seconds(shape, probes) == seconds(shape)
    found = estimates._seconds(asked, probes)
    assert found >= 0
    smaller = [
        probe.seconds for probe in probes if probe.shape.weights <= asked.weights and probe.shape.cost <= asked.cost
    ]
    assert found >= 0.5 * max(smaller, default=0)


@given(shapes, shapes, st.integers(1, 100), st.integers(0, 10**8))
def test_memory_is_a_line_in_the_weights(one: Shape, other: Shape, slope: int, floor: int) -> None:
    probes = [Probe(each, 1.0, floor + slope * each.weights) for each in (one, other)]
    asked = Shape((4096,), 8192)
    found = estimates._bytes(asked, probes)
    if one.weights != other.weights:
        assert found == pytest.approx(floor + slope * asked.weights, rel=1e-6)
    else:
        assert found >= probes[0].bytes
    assert all(estimates._bytes(probe.shape, probes) == pytest.approx(probe.bytes, rel=1e-6) for probe in probes)


@given(shapes, st.sampled_from([1, 2, 4, 8, 16]))
def test_smaller_shapes_are_never_larger(shape: Shape, by: int) -> None:
    divided = shape.divided(by)
    assert all(ours <= out for ours, out in zip(divided.outs, shape.outs, strict=True))
    assert divided.inn <= shape.inn
    assert divided.weights > 0


def plan_of(model: Path, made: list[Any], **options: Any) -> Any:
    calibration = Calibration(prompts=["a"], cache=False) if options.pop("calibrated", False) else None
    return make_plan(open_source(ModelSource(folder=str(model))), Pipeline(made, **options), calibration)


def test_the_work_is_all_layers_by_what_is_done_to_them(model: Path) -> None:
    plan = plan_of(model, stages())
    (shapes,) = work_of(plan).values()
    assert sum(shape.weights * count for shape, count in shapes.items()) == plan.weights
    assert shapes[Shape((64,), 64)] == 16
    shared = plan_of(model, [stages()[0], make_stage("low_rank", "svd", rank=4, share_down=True), stages()[2]])
    (shapes,) = work_of(shared).values()
    assert shapes[Shape((64, 64, 64), 64)] == 2
    assert shapes[Shape((64, 64), 64)] == 2


@pytest.mark.parametrize(
    ("made", "calibrated"),
    [
        (stages("none"), False),
        (stages("svd"), False),
        (stages("loraq_fast", steps=3), False),
        (stages("none", "hqq"), False),
        (stages("svd", "gptq"), True),
        (stages("qera"), True),
    ],
    ids=["none", "svd", "loraq_fast", "hqq", "gptq", "qera"],
)
def test_every_strategy_is_measured_by_running_it(model: Path, made: list[Any], calibrated: bool) -> None:
    plan = plan_of(model, made, calibrated=calibrated)
    found = estimates.estimate(plan, Workers.of("cpu", 2, 1), seed=0, measure=True)
    assert found.seconds is not None
    assert 0 < found.seconds < 600
    assert found.calibrated == calibrated
    largest = 4 * 256 * 64
    assert largest <= found.worker_bytes < 100 * largest + 2**26
    assert found.total_bytes > 2 * found.worker_bytes


def test_nothing_is_claimed_without_measuring_and_what_was_measured_is_kept(model: Path) -> None:
    plan, workers = plan_of(model, stages()), Workers.of("cpu", 1, 1)
    bound = estimates.estimate(plan, workers, seed=0, measure=False)
    assert bound.seconds is None
    assert bound.worker_bytes == 3 * 4 * 256 * 64 + 2**30
    measured = estimates.estimate(plan, workers, seed=0, measure=True)
    again = estimates.estimate(plan, workers, seed=0, measure=False)
    assert again.worker_bytes == measured.worker_bytes
    assert again.seconds == pytest.approx(measured.seconds, rel=0.5)  # but for how fast files are hashed now
    for changed in (plan_of(model, stages("none")), attrs.evolve(plan, components=plan.components * 2)):
        kept = estimates.estimate(changed, workers, seed=0, measure=False).seconds
        assert (kept is None) == (changed.components[0] is not plan.components[0])
    assert estimates.estimate(plan, Workers.of("cpu", 2, 1), seed=0, measure=False).seconds is None


def test_twice_the_layers_take_twice_the_time(model: Path) -> None:
    """And twice the workers half of it, as far as the kept figures go."""
    probes = [Probe(Shape((64,), 64), 1.0, 10**6), Probe(Shape((256,), 64), 3.0, 3 * 10**6)]
    plan, workers = plan_of(model, stages()), Workers.of("cpu", 1, 1)
    (recipe,) = work_of(plan)
    path = estimates._path(recipe, workers)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([attrs.asdict(probe) for probe in probes]))
    one = estimates.estimate(plan, workers, seed=0, measure=False)
    assert one.seconds == pytest.approx(16 * 1.0 + 4 * 3.0, rel=0.01)
    doubled = attrs.evolve(plan, components=plan.components * 2)
    assert estimates.estimate(doubled, workers, seed=0, measure=False).seconds == pytest.approx(2 * 28, rel=0.01)
    path.write_text("[{}]")
    assert estimates.estimate(plan, workers, seed=0, measure=False).seconds is None


def test_probes_grow_as_long_as_there_is_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that the run has are measured themselves where that can be had."""
    plan, workers = plan_of(model, stages("none")), Workers.of("cpu", 1, 1)
    ((recipe, shapes),) = work_of(plan).items()
    monkeypatch.setattr(estimates, "_fit_all", lambda recipe, shape, *_: shape.cost * 1e-12)
    monkeypatch.setattr(estimates, "_peak", lambda recipe, shape, *_: 4 * shape.weights)
    probes = estimates._measured(recipe, Counter(shapes), workers, 0, 10.0)
    assert set(shapes) <= {probe.shape for probe in probes}
    monkeypatch.setattr(estimates, "_fit_all", lambda recipe, shape, *_: shape.cost * 1.0)
    assert len(estimates._measured(recipe, Counter({Shape((4096,), 4096): 1}), workers, 0, 10.0)) == 1


def test_the_command_says_it(model: Path, tmp_path: Path) -> None:
    recipe = models.write_recipe(tmp_path / "recipe.toml", model, tmp_path / "out")
    text = done(loraq("plan", recipe))
    assert "memory: at most " in text
    assert "time: `loraq plan RECIPE --time` measures this machine" in text
    assert json.loads(done(loraq("plan", recipe, "--json")))["estimate"]["seconds"] is None
    text = done(loraq("plan", recipe, "--time"))
    assert "memory: about " in text
    assert "for each of 2 layers at once" in text
    assert "time: about " in text
    assert "time: about " in done(loraq("plan", recipe)), "as measured before"
    assert json.loads(done(loraq("plan", recipe, "--json")))["estimate"]["seconds"] > 0
