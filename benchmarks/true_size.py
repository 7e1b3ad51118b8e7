"""How long a model of true size takes, and how much memory: `loraq plan` and `loraq run` on random weights.

    python benchmarks/true_size.py [--model pixart-sigma | sana | flux-dev | qwen-image] [--steps N] [--workers N]
                                   [--layers N] [--folder FOLDER] [--plan-only]

The architecture is the real one (diffusers' class, the published sizes), the weights are seeded, bfloat16: a decaying
spectrum, noise, and a few input channels eight times the others; layers of one shape have one matrix, its rows rolled.
They are written tensor by tensor, so that 20 billion need no more memory than one matrix, but their bytes on disk, and
the result's. `--plan-only` leaves holes for weights, which takes no room. Times depend on the shapes alone; errors
mean little here. The recipe is the shipped one of that model but for its folder (Qwen-Image takes FLUX's), so the
figures are what a user of the real weights will see.

Printed are what `plan` foretells beside what was measured. The run is a process of its own; its memory is read from
/proc as it works: VmHWM is the system's own peak, mapped pages of the weights' files included, and what a process holds
that has only imported the same is taken off it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from loraq.checkpoint import index_text, plan_files
from loraq.pipeline import tensor_bytes
from loraq.source import WEIGHTS_NAME, TensorSpec

ROOT = Path(__file__).parent.parent
_IMPORTS = "import diffusers, loraq.commands.run, loraq.run, loraq.diffusers; diffusers."
_PLAN = """
import json, sys, time
import diffusers, loraq.commands.plan, loraq.run, loraq.diffusers
diffusers.{name}
from loraq.cli import cli
began = time.perf_counter()
cli(sys.argv[1:], standalone_mode=False)
print(time.perf_counter() - began, file=sys.stderr)
"""


@attrs.frozen
class Architecture:
    """A model's class and sizes; `recipe` is the shipped one to use, `blocks` the options that count its blocks."""

    class_name: str
    options: Mapping[str, Any]
    recipe: str
    blocks: tuple[str, ...] = ("num_layers",)


ARCHITECTURES = {
    "pixart-sigma": Architecture(
        "PixArtTransformer2DModel",
        {"num_layers": 28, "sample_size": 128, "in_channels": 4, "out_channels": 8, "caption_channels": 4096},
        "pixart-sigma-w4a4",
    ),
    "sana": Architecture("SanaTransformer2DModel", {"num_layers": 20}, "sana-w4a4"),
    "flux-dev": Architecture(
        "FluxTransformer2DModel", {"guidance_embeds": True}, "flux-dev-w4a4", ("num_layers", "num_single_layers")
    ),
    "qwen-image": Architecture("QwenImageTransformer2DModel", {}, "flux-dev-w4a4"),
}


def skeleton_of(architecture: Architecture, layers: int | None) -> Any:
    """The transformer on the meta device, with `layers` blocks (of each kind) or all."""
    import diffusers
    from accelerate import init_empty_weights

    options = dict(architecture.options) | ({} if layers is None else dict.fromkeys(architecture.blocks, layers))
    with init_empty_weights():
        return getattr(diffusers, architecture.class_name)(**options)


def write_model(folder: Path, skeleton: Any, *, holes: bool = False) -> int:
    """Write a model folder as `save_pretrained` would, a tensor at a time. Returns how many weights it has.

    With `holes` the files have their header and their size, and no content.
    """
    folder.mkdir(parents=True)
    specs = {name: TensorSpec("BF16", tuple(tensor.shape)) for name, tensor in skeleton.state_dict().items()}
    files = plan_files(specs)
    made: dict[tuple[int, ...], Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for file in files:
        with (folder / file.name).open("wb") as target:
            target.write(file.header)
            target.truncate(file.size)
            for place, (name, (start, _)) in enumerate({} if holes else file.places.items()):
                shape = specs[name].shape
                if shape not in made:
                    made[shape] = weight_like(torch.Size(shape), generator).bfloat16()
                target.seek(start)
                target.write(tensor_bytes(made[shape].roll(place, 0) if shape else made[shape]))
    index = index_text(files)
    if index is not None:
        (folder / f"{WEIGHTS_NAME}.index.json").write_text(index, encoding="utf-8")
    skeleton.save_config(folder)
    return sum(tensor.numel() for tensor in skeleton.state_dict().values())


def weight_like(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random values; of a matrix with a spectrum that decays and a few large columns."""
    if len(shape) < 2 or min(shape[0], shape[1]) < 64:
        return torch.randn(shape, generator=generator) * 0.02
    out, inn = shape[0], shape[1:].numel()
    rank = min(out, inn, 256)
    strengths = torch.arange(1, rank + 1).pow(-0.6)
    values = torch.randn(out, rank, generator=generator) * strengths @ torch.randn(rank, inn, generator=generator)
    values = values / values.std() + 0.5 * torch.randn(out, inn, generator=generator)
    values[:, torch.randperm(inn, generator=generator)[:8]] *= 8
    return (values * 0.02).reshape(shape)


def memory_of(process: int) -> dict[str, int]:
    """What the system says of a process's memory, in bytes: VmHWM, RssAnon, RssFile; empty when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    found = dict(line.split(":") for line in lines if line.startswith(("VmHWM", "RssAnon", "RssFile")))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


@attrs.define
class Watch:
    """The largest figures of a process's memory while it runs, looked at a hundred times a second."""

    peak: dict[str, int] = attrs.field(factory=dict)

    def over(self, process: int) -> None:
        """Look until it is gone."""
        while found := memory_of(process):
            self.peak = {name: max(value, self.peak.get(name, 0)) for name, value in found.items()}
            time.sleep(0.01)


def imported(class_name: str) -> int:
    """The peak of a process that imports what a run imports, and does nothing."""
    code = f"{_IMPORTS}{class_name}\nprint(open('/proc/self/status').read())"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM"))


def watched(command: list[str]) -> tuple[str, dict[str, int], float]:
    """What a command printed, its peaks, and its seconds."""
    watch = Watch()
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        thread = threading.Thread(target=watch.over, args=(running.pid,), daemon=True)
        thread.start()
        out, err = running.communicate()
    if running.returncode:
        raise SystemExit(err)
    return out, watch.peak, time.perf_counter() - began


def told(plan: Mapping[str, Any], seconds: float) -> Iterator[str]:
    """What `plan` foretells."""
    layers = [layer for component in plan["components"] for layer in component["layers"]]
    largest = max(layer["out"] * layer["inn"] for layer in layers)
    yield (
        f"plan: {seconds:.2f} s after imports: {len(layers)} layers, {plan['source_bytes'] / 1e9:.2f} GB become "
        f"{plan['written_bytes'] / 1e9:.2f} GB, {plan['effective_bits']:.2f} bits a weight"
    )
    yield (
        f"promised: a worker takes {bound_of(plan) / 2**30:.2f} GiB at most, three times the largest layer's "
        f"{4 * largest / 2**30:.2f} GiB in float32 and 1 GiB"
    )


def bound_of(plan: Mapping[str, Any]) -> int:
    """What a worker may take, from the largest group of layers."""
    groups: dict[str, int] = {}
    for component in plan["components"]:
        for layer in component["layers"]:
            leader = f"{component['name']}:{layer['down_from'] or layer['name']}"
            groups[leader] = groups.get(leader, 0) + layer["out"] * layer["inn"]
    return 3 * 4 * max(groups.values()) + 2**30


def processor_seconds() -> float:
    """Of all child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def planned(code: str, given: list[str]) -> tuple[dict[str, Any], float]:
    """What `loraq plan` says as a process of its own, and the seconds that it took after its imports."""
    done = subprocess.run([sys.executable, "-c", code, "plan", *given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), float(done.stderr.split()[-1])


def arguments(home: Path, architecture: Architecture, workers: int, steps: int | None) -> list[str]:
    """What `loraq plan` and `loraq run` are given: the shipped recipe with the model in `home`, and settings."""
    recipe = (ROOT / "recipes" / f"{architecture.recipe}.toml").read_text(encoding="utf-8")
    lines = [line for line in recipe.splitlines() if not line.startswith("model.hub")]
    path = home / "recipe.toml"
    path.write_text("\n".join([f'model.folder = "{home}/model"', *lines]), encoding="utf-8")
    settings = [f"run.output={home}/out", f"run.workers={workers}"]
    settings += [] if steps is None else [f"low_rank.steps={steps}"]
    return [str(path), *(part for setting in settings for part in ("--set", setting))]


def foretold(given: list[str], class_name: str) -> dict[str, Any]:
    """Print what `plan` says, without and with --time, and return what the latter estimates."""
    code = _PLAN.format(name=class_name)
    plan, seconds = planned(code, [*given, "--json"])
    for line in told(plan, seconds):
        print(line, flush=True)
    plan, seconds = planned(code, [*given, "--json", "--time"])
    expected: dict[str, Any] = plan["estimate"]
    print(
        f"foretold by --time, {seconds:.0f} s: {expected['seconds']:.0f} s, {expected['workers']} layers at once, "
        f"{expected['worker_bytes'] / 2**30:.2f} GiB each, {expected['total_bytes'] / 2**30:.2f} GiB in all",
        flush=True,
    )
    return expected


def measured(given: list[str], class_name: str, expected: Mapping[str, Any]) -> None:
    """Run, and print what it took."""
    floor = imported(class_name)
    before = processor_seconds()
    out, peak, seconds = watched([sys.executable, "-m", "loraq", "run", *given])
    busy = processor_seconds() - before
    print(next(line for line in reversed(out.splitlines()) if "done in" in line).strip())
    print(
        f"measured: {seconds:.0f} s, {seconds / expected['seconds']:.2f} times what was foretold "
        f"({busy:.0f} processor seconds, imports among them)"
    )
    print(
        f"measured: peak {peak['VmHWM'] / 2**30:.2f} GiB, {(peak['VmHWM'] - floor) / 2**30:.2f} GiB above the "
        f"{floor / 2**30:.2f} GiB of the imports (largest seen: {peak['RssAnon'] / 2**30:.2f} GiB its own, "
        f"{peak['RssFile'] / 2**30:.2f} GiB mapped files, libraries included)"
    )


def main() -> None:
    """Build, plan, quantize, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), default="pixart-sigma")
    parser.add_argument("--steps", type=int, help="loraq_fast's steps, instead of the recipe's")
    parser.add_argument("--workers", type=int, default=0, help="layers in flight, one thread each; 0 takes one a core")
    parser.add_argument("--layers", type=int, help="only so many blocks (of each kind)")
    parser.add_argument("--folder", type=Path, help="where the weights and the result lie for a while")
    parser.add_argument("--plan-only", action="store_true", help="only `loraq plan`, on weights that are holes")
    options = parser.parse_args()
    architecture = ARCHITECTURES[options.model]
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        os.environ["XDG_CACHE_HOME"] = f"{home}/cache"  # nothing that was measured before
        began = time.perf_counter()
        skeleton = skeleton_of(architecture, options.layers)
        weights = write_model(Path(home) / "model", skeleton, holes=options.plan_only)
        print(f"{options.model}: {weights / 1e9:.2f} B weights made in {time.perf_counter() - began:.0f} s", flush=True)
        given = arguments(Path(home), architecture, options.workers, options.steps)
        expected = foretold(given, architecture.class_name)
        if not options.plan_only:
            measured(given, architecture.class_name, expected)


if __name__ == "__main__":
    main()
