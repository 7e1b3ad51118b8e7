"""What runs on a GPU, on a device that is only told apart from the CPU (elsewhere.py): nothing mixes the two.

And what runs where torch's default dtype is another. test_other_device.py runs this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import elsewhere
import loraq
import models
from elsewhere import Elsewhere
from loraq import formats, ops, registry
from loraq.diffusers import PackedLinear
from loraq.layout import Layout
from loraq.recipe import load
from loraq.run import run_recipe
from matrices import seeded

pytestmark = pytest.mark.skipif(not elsewhere.there_is(), reason="this torch has no devices made in Python")


@pytest.fixture
def there() -> Iterator[str]:
    with elsewhere.device():
        yield "elsewhere:0"


class TestTheDevice:
    """It is as strict as a GPU."""

    @pytest.mark.parametrize(
        "mixed",
        [
            lambda x: x + torch.ones(4, 6),
            lambda x: torch.cat([x, torch.ones(1, 6)]),
            lambda x: x.numpy(),
            lambda x: torch.randn(3, generator=torch.Generator(device=x.device)),
        ],
        ids=["sum", "cat", "numpy", "generator"],
    )
    def test_mixing_is_an_error(self, there: str, mixed: Any) -> None:
        with pytest.raises(RuntimeError):
            mixed(seeded(4, 6).to(there))

    def test_what_a_gpu_allows(self, there: str) -> None:
        x = seeded(4, 6).to(there)
        x[1:3] += 1
        x[torch.tensor([0, 2])] = torch.zeros(6, device=there)
        made = x * torch.tensor(2.0) + torch.randn(
            4, 6, generator=torch.Generator(device=there).manual_seed(0), device=there
        )
        assert isinstance(made, Elsewhere)
        assert not isinstance(made.cpu(), Elsewhere)
        weight = x.clone().requires_grad_()
        (weight @ x.T).square().sum().backward()
        assert isinstance(weight.grad, Elsewhere)

    def test_division_by_a_number_is_a_multiplication(self, there: str) -> None:
        values = torch.rand(100_000)
        here, found = values / 7, (values.to(there) / 7).cpu()
        assert not torch.equal(here, found)
        assert torch.allclose(here, found)


@pytest.mark.parametrize("name", registry.names("loraq.format"))
def test_formats(name: str, there: str) -> None:
    format, values = formats.named(name), seeded(40, 96)
    limits = formats.largest(values, 32) * 0.9
    for given in ((), (limits,)):
        here = format.encode(values, 32, *given)
        coded = format.encode(values.to(there), 32, *(each.to(there) for each in given))
        assert torch.equal(coded.decode().cpu(), here.decode())
        if format.integer:
            assert all(isinstance(each, Elsewhere) for each in format.integer_view(coded)[:2])


class Net(nn.Module):
    """Layers of different shapes, two of which read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(64, 128), nn.Linear(128, 64)
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, input: Tensor) -> Tensor:
        hidden: Tensor = self.back(torch.relu(self.wide(input)))
        return hidden + self.query(input) * self.key(input)


STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "pre_transform": ("hadamard", {"signs": True}),
    "main_quantizer": ("rtn", {"activation": "int8"}),
    "low_rank": ("loraq_fast", {"rank": 8, "noise": 1.0}),
    "branch_quantizer": ("rtn", {}),
}
CASES = [(kind, name) for kind in STAGES for name in registry.names(f"loraq.{kind}")]


def pipeline(kind: str, name: str) -> loraq.Pipeline:
    """The usual stages but for one; short fits."""
    chosen = STAGES | {kind: (name, {"rank": 8} if kind == "low_rank" and name != "none" else {})}
    if (kind, name) == ("low_rank", "none"):
        del chosen["branch_quantizer"]
    stages = []
    for each, (strategy, options) in chosen.items():
        made: Any = registry.load(f"loraq.{each}", strategy)
        known = {field.name for field in attrs.fields(made)}
        short = {option: 2 for option in ("steps", "rounds") if option in known}
        stages.append(loraq.stage(each, strategy, **(short | options)))  # type: ignore[arg-type]
    return loraq.Pipeline(stages, workers=1)


def quantized(made: loraq.Pipeline, device: str, default: torch.dtype = torch.float32) -> tuple[loraq.Report, Tensor]:
    """A net quantized where it lies under a default dtype, and what it then makes of its input."""
    torch.manual_seed(0)
    net, input = Net().to(device), seeded(40, 64).to(device)
    torch.set_default_dtype(default)
    try:
        return made.quantize(net, calibrate=lambda module: module(input)), net(input).detach()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_strategies(kind: str, name: str, there: str) -> None:
    """Fitted, calibrated and run there, with about the errors that they have here: other code fits on the CPU."""
    made = pipeline(kind, name)
    here, output = quantized(made, "cpu")
    report, found = quantized(made, there)
    assert isinstance(found, Elsewhere)
    for one, other in zip(here.layers, report.layers, strict=True):
        assert other.error_after == pytest.approx(one.error_after, rel=0.1)
    assert torch.linalg.vector_norm(found.cpu() - output) < 0.2 * torch.linalg.vector_norm(output)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_under_another_default_dtype(kind: str, name: str) -> None:
    """Some programs set it for the model they are about to make; fits stay in float32."""
    made = pipeline(kind, name)
    _, output = quantized(made, "cpu")
    _, found = quantized(made, "cpu", default=torch.bfloat16)
    assert torch.equal(found, output)


@pytest.mark.parametrize("weight", ["int4", "int4x2", "int4_asymmetric", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("activation", ["int8", "none"])
def test_a_packed_layer_moves(weight: str, activation: str, there: str) -> None:
    torch.manual_seed(0)
    net, input = Net(), seeded(5, 64)
    stages = [
        loraq.stage("pre_transform", "hadamard", signs=True),
        loraq.stage("main_quantizer", "rtn", weight=weight, activation=activation),
        loraq.stage("low_rank", "svd", rank=4),
        loraq.stage("branch_quantizer", "rtn"),
    ]
    loraq.Pipeline(stages).quantize(net)
    layer = net.wide
    assert isinstance(layer, PackedLinear)
    here = ops.reference(input, layer.stored(), layer.bias, layer.layout)
    layer.to(there)
    output = layer(input.to(there))
    assert isinstance(output, Elsewhere)
    assert torch.allclose(output.cpu(), here, atol=1e-5)
    assert isinstance(layer.dequantized().weight.data, Elsewhere)
    layer.to("cpu")
    assert torch.allclose(layer(input), here, atol=1e-5)


class Counting(TorchDispatchMode):
    """How many operations a GPU would be told to start, and how many numbers would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.started = self.waited = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.waited += str(func).startswith("aten._local_scalar_dense")
        self.started += not func.is_view
        return result


def test_a_step_of_a_fit_starts_few_operations_and_waits_for_none(there: str) -> None:
    counts = []
    for steps in (2, 12):
        stages = [
            loraq.stage("main_quantizer", "rtn", weight="int4", activation="int4"),
            loraq.stage("low_rank", "loraq_fast", rank=8, steps=steps, noise=1.0),
            loraq.stage("branch_quantizer", "rtn", weight="int4", activation="int8"),
        ]
        with Counting() as counting:
            loraq.pipeline.quantize_layer("layer", seeded(96, 128).to(there), loraq.pipeline.bind(stages), seed=0)
        counts.append((counting.started, counting.waited))
    assert counts[1][1] == counts[0][1]
    assert counts[1][0] - counts[0][0] <= 10 * 75


RECIPES = {
    "data-free": ("smooth", "rtn", "loraq_fast", ", steps = 2", ""),
    "shared down": ("none", "rtn", "loraq_fast", ", steps = 2, share_down = true", ""),
    "calibrated": ("smooth_calibrated", "gptq", "qera", "", "calibration"),
    "allocated": ("none", "rtn", "loraq_fast", ", steps = 2", "allocate"),
}
MORE = {
    "": "",
    "calibration": '[calibration]\nprompts = "PROMPTS"\ncount = 2\n'
    "call = { num_inference_steps = 2, use_resolution_binning = false }\n",
    "allocate": '[allocate]\nbudget = "rank4@16"\n'
    '[[allocate.choice]]\nmain_quantizer.weight = "int3"\n[[allocate.choice]]\nmain_quantizer.weight = "int6"\n',
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_whole_run(name: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    smoothing, main, low_rank, options, more = RECIPES[name]
    model = models.saved_pipeline(tmp_path / "model", layers=1)
    (tmp_path / "prompts.txt").write_text("a small red ring\na large blue square\n")
    errors = []
    for device in ("cpu", there):
        path = tmp_path / "recipe.toml"
        path.write_text(
            f"""
model.folder = "{model}"
run = {{ output = "{tmp_path / device[:3]}", device = "{device}", workers = 2 }}
stage = [
    {{ kind = "pre_transform", strategy = "{smoothing}" }},
    {{ name = "rotation", kind = "pre_transform", strategy = "hadamard", signs = true }},
    {{ kind = "main_quantizer", strategy = "{main}", weight = "int4", activation = "int8" }},
    {{ kind = "low_rank", strategy = "{low_rank}", rank = 4{options} }},
    {{ kind = "branch_quantizer", strategy = "rtn" }},
]
{MORE[more].replace("PROMPTS", str(tmp_path / "prompts.txt"))}
"""
        )
        errors.append([layer.error_after for layer in run_recipe(load(path)).layers])
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_layers_are_made_ready_for_the_cuda_kernels_there(there: str) -> None:
    """Their matrices are repacked on the GPU."""
    from loraq.kernels.cuda import fallback, prepared

    plain: dict[str, Any] = {
        "out": 40,
        "inn": 192,
        "rank": 9,
        "main": {"format": "int4", "group": 64},
        "activation": "int4",
        "down": {"format": "int4", "group": 64},
        "up": {"format": "int4", "group": 64},
        "branch_activation": "int8",
        "packing": {"strategy": "rows"},
        "transforms": [{"strategy": "smooth"}, {"strategy": "hadamard", "signs": True}],
    }
    for changed in (
        {},
        {"main": {"format": "int4x2", "group": 64}, "activation": {"format": "int8", "group": "token"}},
    ):
        layout = Layout.from_plain(plain | changed)
        tensors = {
            name: torch.randint(0, 100, stored.shape).to(getattr(torch, stored.dtype))
            for name, stored in layout.stored().items()
        }
        moved = {name: tensor.to(there) for name, tensor in tensors.items()}
        for architecture in ("86", "90"):
            here = prepared.Prepared.of(layout, tensors, architecture)
            found = prepared.Prepared.of(layout, moved, architecture)
            assert isinstance(found.main.codes, Elsewhere)
            assert torch.equal(found.main.codes.cpu(), here.main.codes)
            assert here.factors is not None
            assert found.factors is not None
            assert torch.equal(found.factors.cpu(), here.factors)
            assert isinstance(found.bias(torch.ones(40, device=there)), Elsewhere)
        assert isinstance(fallback.PlainLayer.of(layout, moved).main.codes, Elsewhere)
