"""Methods compared by the pictures they draw, on the small trained model, at equal stored bytes.

    python benchmarks/images.py                                        everything: 18 cells of 256 pictures
    python benchmarks/images.py --pictures 32 --activation int4 --budget rank32@16 --method rtn --method "svd W16"

Each cell quantizes the model in memory by one method and draws pictures of the same prompts and noise as the 16-bit
model (which computes in float32, as every model does on a CPU). Columns: PSNR to the 16-bit model's pictures; the
paired difference to SVDQuant (svd with a 16-bit branch, the same bytes, pre-transform, scales and activations); the
share of pictures that show the size, colour, shape and ground that the caption says, read from the picture by
loraq/shapes.py, which has nothing learned in it; the packed layers' bytes. Means come with 95 % intervals
(loraq/bootstrap.py), shares with Wilson's. Three captions in eight are of scenes on which the model was not trained,
and no caption comes twice. Finished cells lie in --keep and are not repeated, unless a source file or a setting
changed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy
import torch
from numpy.typing import NDArray
from PIL import Image

import loraq
from loraq.bootstrap import Interval, interval, wilson
from loraq.pictures import Drawing, fingerprint
from loraq.progress import Progress
from loraq.samples import draw_together, load_pipeline, psnr
from loraq.shapes import Scene, caption, matches, measure, split_scenes

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "recipes" / "tiny-pixart-sigma"
BASELINE = "svd W16"


@attrs.frozen
class Method:
    """A row's low-rank strategy and its options, its branch's quantizer (None: 16 bits), and its main quantizer."""

    low_rank: str
    branch: dict[str, str] | None = None
    options: dict[str, Any] = attrs.field(factory=dict)
    main: str = "rtn"
    calibrated: bool = False
    weight: dict[str, Any] = attrs.field(factory=lambda: {"weight": "int4"})
    """Options of the main quantizer's codes."""
    transform: str = ""
    """A pre-transform of its own, in place of the setting's."""


W8A8 = {"weight": "int8", "activation": "int8"}
W6A6 = {"weight": "int6", "activation": "int6"}
W4A8 = {"weight": "int4", "activation": "int8"}
FAST = {"steps": 200}
QUIET = {"steps": 200, "noise": 1.0}
METHODS: dict[str, Method] = {
    "rtn": Method("none"),
    BASELINE: Method("svd"),
    "alternating W16": Method("alternating"),
    "svd W4A8": Method("svd", W4A8),
    "deflated W16": Method("deflated", calibrated=True),
    "deflated W4A8": Method("deflated", W4A8, calibrated=True),
    "loraq W8A8": Method("loraq_fast", W8A8, FAST),
    "loraq W6A6": Method("loraq_fast", W6A6, FAST),
    "loraq W4A8": Method("loraq_fast", W4A8, FAST),
    "loraq W8A8 noise": Method("loraq_fast", W8A8, QUIET),
    "loraq W4A8 noise": Method("loraq_fast", W4A8, QUIET),
    "loraq W4A8 gptq": Method("loraq_fast", W4A8, FAST, main="gptq", calibrated=True),
    "sdnq int4": Method("sdnq_svd", main="sdnq", transform="sdnq_hadamard"),
    "sdnq uint4": Method("sdnq_svd", main="sdnq", transform="sdnq_hadamard", weight={"weight": "uint4", "group": 128}),
}
"""By name. "noise" counts the rounding of the input in the fit; "gptq" rounds the main codes at last. sdnq is the
library of that name, with its own SVD and Hadamard matrix; it needs peers/ installed."""
USUAL = (
    "rtn",
    BASELINE,
    "alternating W16",
    "deflated W16",
    "loraq W8A8",
    "loraq W6A6",
    "loraq W4A8",
    "loraq W8A8 noise",
    "loraq W4A8 noise",
    "loraq W4A8 gptq",
)
CALIBRATING = 8
"""Pictures that calibrated methods see, of captions and seeds that are not drawn for the table."""
ACTIVATIONS = ("int4", "int8")
BUDGETS = ("rank32@16", "rank8@16")
LARGEST = 960
BATCH = 32


@attrs.frozen
class Cell:
    """One quantized model: a row of the table (rtn is one cell for all budgets, as it has no branch)."""

    transform: str
    activation: str
    budget: str
    method: str

    @property
    def name(self) -> str:
        """A name for its file."""
        budget = "" if METHODS[self.method].low_rank == "none" else f"-{self.budget}"
        return f"{self.transform}-A{self.activation}{budget}-{self.method.replace(' ', '-')}"

    def pipeline(self, workers: int) -> loraq.Pipeline:
        """What quantizes the model."""
        method = METHODS[self.method]
        budget = {} if method.low_rank == "none" else {"budget": self.budget}
        return loraq.Pipeline(
            [
                loraq.stage("pre_transform", method.transform or self.transform),
                loraq.stage("main_quantizer", method.main, **method.weight, activation=self.activation),
                loraq.stage("low_rank", method.low_rank, **budget, **method.options),
                loraq.stage("branch_quantizer", "none" if method.branch is None else "rtn", **(method.branch or {})),
            ],
            workers=workers,
        )


@attrs.frozen(eq=False)
class Drawn:
    """A finished cell: its pictures (pictures, rows, columns, 3) uint8, what they show, and what it took."""

    pictures: NDArray[numpy.uint8]
    obeyed: NDArray[numpy.bool_]
    """(pictures, 4): size, colour, shape and ground as the caption says."""
    stored_bytes: int
    effective_bits: float
    quantizing: float
    """Seconds."""
    drawing: float
    """Seconds."""


@attrs.frozen
class Bench:
    """The settings that all cells share, and where finished cells are kept."""

    scenes: tuple[Scene, ...]
    calibrating: tuple[str, ...]
    drawing: Drawing
    keep: Path
    workers: int
    code: str

    def told(self, name: str) -> str:
        """What a kept file must say of itself to be taken."""
        settings = {"cell": name, "code": self.code, "model": fingerprint(MODEL), **attrs.asdict(self.drawing)}
        return json.dumps(settings, sort_keys=True)

    def kept(self, name: str) -> Drawn | None:
        """The finished cell called `name`, if it is there and was made by the same code and settings."""
        try:
            with numpy.load(self.keep / f"{name}.npz", allow_pickle=False) as file:
                if str(file["told"]) != self.told(name):
                    return None
                numbers = json.loads(str(file["numbers"]))
                return Drawn(file["pictures"], file["obeyed"], **numbers)
        except FileNotFoundError:
            return None

    def write(self, name: str, drawn: Drawn) -> None:
        """Keep a finished cell, whole or not at all."""
        numbers = attrs.asdict(drawn, filter=lambda field, _: field.name not in ("pictures", "obeyed"))
        self.keep.mkdir(parents=True, exist_ok=True)
        partial = self.keep / f".{name}.partial"
        with partial.open("wb") as file:
            numpy.savez_compressed(
                file,
                told=numpy.array(self.told(name)),
                numbers=numpy.array(json.dumps(numbers)),
                pictures=drawn.pictures,
                obeyed=drawn.obeyed,
            )
        partial.replace(self.keep / f"{name}.npz")

    def run(self, pipeline: Any, original: torch.nn.Module, cell: Cell | None) -> Drawn:
        """The cell's pictures, drawn now or earlier; None is the 16-bit model."""
        name = "original" if cell is None else cell.name
        kept = self.kept(name)
        if kept is not None:
            return kept
        began = time.perf_counter()
        stored_bytes, bits = sum(each.numel() for each in original.parameters()) * 2, 16.0
        pipeline.transformer = original
        if cell is not None:
            pipeline.transformer = copy.deepcopy(original)

            def calibrate() -> None:
                seeds = range(2**31, 2**31 + len(self.calibrating))
                draw_together(pipeline, self.calibrating, seeds, self.drawing.call)

            chosen = calibrate if METHODS[cell.method].calibrated else None
            report = cell.pipeline(self.workers).quantize(pipeline.transformer, calibrate=chosen)
            stored_bytes, bits = report.stored_bytes, report.effective_bits
        quantized = time.perf_counter()
        pictures: list[Image.Image] = []
        with Progress(name, len(self.scenes)) as progress:
            for places in self.drawing.batches():
                prompts = [self.drawing.prompts[place] for place in places]
                seeds = [self.drawing.seed + place for place in places]
                pictures += draw_together(pipeline, prompts, seeds, self.drawing.call)
                progress.advance(len(places), prompts[-1])
        finished = time.perf_counter()
        arrays = numpy.stack([numpy.asarray(picture.convert("RGB")) for picture in pictures])
        obeyed = numpy.array(
            [matches(scene, measure(picture).scene) for scene, picture in zip(self.scenes, arrays, strict=True)]
        )
        drawn = Drawn(arrays, obeyed, stored_bytes, bits, quantized - began, finished - quantized)
        self.write(name, drawn)
        return drawn


@attrs.frozen(kw_only=True)
class Row:
    """A line of the table."""

    transform: str
    activation: str
    budget: str
    method: str
    stored_bytes: int
    effective_bits: float
    psnr: Interval
    difference: Interval | None
    """PSNR less that of SVDQuant in the same setting, picture by picture; None where that was not drawn."""
    obeyed: tuple[float, float, float]
    """The share of pictures that are as the caption says in all, and its Wilson interval."""
    attributes: tuple[float, ...]
    """The same for size, colour, shape and ground, without intervals."""
    quantizing: float
    drawing: float


def chosen_scenes(count: int, seed: int) -> tuple[Scene, ...]:
    """`count` different scenes, three in eight of them held out of training (all 96 where that is fewer)."""
    seen, held_out = split_scenes()
    share = max(min(len(held_out), 3 * count // 8), count - len(seen))
    generator = numpy.random.default_rng(seed)
    chosen = [held_out[place] for place in generator.permutation(len(held_out))[:share]]
    return tuple(chosen + [seen[place] for place in generator.permutation(len(seen))[: count - share]])


def code_digest() -> str:
    """A digest of all source files that a figure may depend on."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for folder in ("loraq", "stages", "strategies", "kernels", "recipes/tiny_pixart"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def ratios(drawn: Drawn, original: Drawn) -> list[float]:
    """PSNR of each picture to the 16-bit model's, dB."""
    pairs = zip(drawn.pictures, original.pictures, strict=True)
    return [psnr(Image.fromarray(first), Image.fromarray(second)) for first, second in pairs]


def row(cell: Cell, drawn: Drawn, original: Drawn, baseline: Drawn | None, drawing: Drawing) -> Row:
    """The cell's line; `baseline` is SVDQuant's cell in the same setting."""
    own = ratios(drawn, original)
    difference = None
    if baseline is not None and cell.method != BASELINE:
        less = [a - b for a, b in zip(own, ratios(baseline, original), strict=True)]
        difference = interval(less, drawing.prompts, seed=drawing.seed)
    return Row(
        **attrs.asdict(cell),
        stored_bytes=drawn.stored_bytes,
        effective_bits=drawn.effective_bits,
        psnr=interval(own, drawing.prompts, seed=drawing.seed),
        difference=difference,
        obeyed=wilson(int(drawn.obeyed.all(axis=1).sum()), len(drawn.obeyed)),
        attributes=tuple(float(share) for share in drawn.obeyed.mean(axis=0)),
        quantizing=drawn.quantizing,
        drawing=drawn.drawing,
    )


def span(found: Interval | None, sign: str = "") -> str:
    """A mean with its interval, as text."""
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:{sign}.2f}"
    return f"{found.mean:{sign}.2f} [{found.low:{sign}.2f}, {found.high:{sign}.2f}]"


def table(rows: Sequence[Row], original: Drawn) -> str:
    """The rows as text, a block a setting."""
    head = f"{'method':16} {'PSNR, dB':>22} {'less SVDQuant, dB':>24} {'as the caption says':>24} {'bytes':>10}"
    head += f" {'bits':>5} {'fit s':>6} {'draw s':>6}"
    lines = []
    for setting in dict.fromkeys((each.transform, each.activation, each.budget) for each in rows):
        lines += ["", f"{setting[0]}, W4A{setting[1].removeprefix('int')}, {setting[2]}", head]
        for each in rows:
            if (each.transform, each.activation, each.budget) == setting:
                obeyed = "{:.1%} [{:.1%}, {:.1%}]".format(*each.obeyed)
                lines.append(
                    f"{each.method:16} {span(each.psnr):>22} {span(each.difference, '+'):>24} {obeyed:>24} "
                    f"{each.stored_bytes:10,} {each.effective_bits:5.2f} {each.quantizing:6.1f} {each.drawing:6.1f}"
                )
    obeyed = "{:.1%} [{:.1%}, {:.1%}]".format(*wilson(int(original.obeyed.all(axis=1).sum()), len(original.obeyed)))
    lines += ["", f"16-bit model: {obeyed} as the caption says, drawn in {original.drawing:.1f} s"]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256, help="pictures a cell (default: %(default)s)")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; by default " + ", ".join(USUAL))
    parser.add_argument("--activation", action="append", choices=ACTIVATIONS, help="repeatable; both by default")
    parser.add_argument("--budget", action="append", choices=BUDGETS, help="repeatable; both by default")
    parser.add_argument("--transform", action="append", help="a pre-transform, repeatable; hadamard by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the captions and of the first picture's noise")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads while drawing; 0 takes every core")
    parser.add_argument("--workers", type=int, default=0, help="layers fitted at once; 0 takes one a core")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "out" / "images", help="finished cells (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write every row to this file")
    options = parser.parse_args()
    if not 0 < options.pictures <= LARGEST:
        parser.error(f"--pictures: there are {LARGEST} captions, so 1 to {LARGEST} pictures, got {options.pictures}")
    return options


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    scenes = chosen_scenes(options.pictures, options.seed)
    call = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 16,
    }
    drawing = Drawing(prompts=tuple(caption(scene) for scene in scenes), seed=options.seed, call=call, batch=BATCH)
    others = [scene for scene in split_scenes()[0] if scene not in scenes]
    calibrating = tuple(caption(scene) for scene in others[:: max(1, len(others) // CALIBRATING)][:CALIBRATING])
    bench = Bench(scenes, calibrating, drawing, options.keep, options.workers, code_digest())
    wanted = [
        Cell(transform, activation, budget, method)
        for transform in options.transform or ("hadamard",)
        for activation in options.activation or ACTIVATIONS
        for budget in options.budget or BUDGETS
        for method in options.method or USUAL
    ]
    began = time.perf_counter()
    pipeline = load_pipeline(MODEL, torch.device("cpu"))
    transformer = pipeline.transformer
    original = bench.run(pipeline, transformer, None)
    drawn: dict[Cell, Drawn] = {}
    for number, cell in enumerate(wanted, 1):
        drawn[cell] = bench.run(pipeline, transformer, cell)
        print(
            f"{number} of {len(wanted)}: {cell.name}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True
        )
    rows = [
        row(cell, found, original, drawn.get(attrs.evolve(cell, method=BASELINE)), drawing)
        for cell, found in drawn.items()
    ]
    print(table(rows, original))
    print(f"{len(scenes)} pictures a cell, {len(rows)} cells, {time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([attrs.asdict(each) for each in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
