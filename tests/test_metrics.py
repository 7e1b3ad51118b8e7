"""Metrics: each library's real code on small networks of the true architecture, against the formula written out."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraq.strategies.metric import clip, frechet
from loraq.strategies.metric.caption import Caption
from loraq.strategies.metric.clip_iqa import ClipIqa
from loraq.strategies.metric.clip_score import ClipScore
from loraq.strategies.metric.fid import Fid
from loraq.strategies.metric.fid_original import FidOriginal
from loraq.strategies.metric.image_reward import ImageReward
from loraq.strategies.metric.lpips import Lpips
from PIL import Image

import models
from command import done, loraq, refused
from loraq import evaluation, registry, shapes
from loraq.bootstrap import share_interval
from loraq.contracts import AbstractParticular
from loraq.errors import InputError, LoraqError, RecipeError
from loraq.evaluation import load_metrics
from loraq.picture_set import PictureSet
from loraq.prompts import prompt_set

ALL = ("caption", "clip_iqa", "clip_score", "fid", "fid_original", "image_reward", "lpips", "psnr", "ssim")


def noise(seed: int, side: int = 40) -> Image.Image:
    values = numpy.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=numpy.uint8)
    return Image.fromarray(values)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights anywhere, and no network: a look at it fails the test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("loraq.strategies.metric.frechet._OWN_FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("the network is asked"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network is asked"))
    return tmp_path


def test_all_of_the_field_are_on_offer_and_say_what_they_lack(bare: Path) -> None:
    assert {*ALL} <= {*registry.names("loraq.metric")}
    metrics, left_out = load_metrics(ALL)
    assert {"psnr", "ssim", "caption"} <= {*metrics}
    for name in ("clip_iqa", "clip_score"):
        assert f"(--download) fetches them, as does `hf download {clip.DEFAULT}`." in left_out[name]
    for name, reason in left_out.items():
        assert reason.endswith("."), name
        assert "\n" not in reason


# CLIP


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CLIP's architecture, small, with random weights, and its two processors."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz."
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 24}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=small | words, vision_config=small | {"image_size": 32, "patch_size": 8})
    model = CLIPModel(config)
    with torch.no_grad():  # projections of usual size give all pictures much the same score
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def embeddings(folder: Path, picture: Image.Image, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of a picture and texts, by transformers alone."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    values = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        found = model(pixel_values=values, **tokens)
    return found.image_embeds[0], found.text_embeds


def test_clip_score_is_the_formula(small_clip: Path) -> None:
    metric = ClipScore(model=str(small_clip), device="cpu")
    assert metric.refusal() is None
    seen = []
    for seed, prompt in enumerate(("a cat", "zebra.", "qqq xx")):
        first, second = embeddings(small_clip, noise(seed), [prompt])
        expected = max(100 * float(first @ second[0]), 0)
        assert metric.measure(noise(seed), noise(9), prompt) == pytest.approx(expected, abs=1e-3)
        seen.append(expected)
    assert len({*seen}) > 1
    assert max(seen) > 0


def test_a_prompt_longer_than_clip_reads_is_cut_in_silence(small_clip: Path, recwarn: pytest.WarningsRecorder) -> None:
    metric = ClipScore(model=str(small_clip), device="cpu")
    assert math.isfinite(metric.measure(noise(0), noise(0), "abc " * 50))
    assert not [each for each in recwarn if "truncate" in str(each.message)]


def test_clip_iqa_is_the_formula(small_clip: Path) -> None:
    metric = ClipIqa(model=str(small_clip), device="cpu")
    for seed in range(2):
        picture, texts = embeddings(small_clip, noise(seed), ["Good photo.", "Bad photo."])
        expected = torch.softmax(100 * picture @ texts.T, -1)[0]
        assert metric.measure(noise(seed), noise(9), "") == pytest.approx(float(expected), abs=1e-4)


def test_a_model_that_is_not_whole_is_left_out(small_clip: Path, tmp_path: Path) -> None:
    folder = models.copy_of(small_clip, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    reason = ClipScore(model=str(folder)).refusal()
    assert reason is not None
    assert "model.safetensors" in reason
    assert ClipScore(model="../odd name").refusal() is not None


# LPIPS. torchvision has no build for every torch, so a stand-in with the published AlexNet takes its place; it needs a
# process of its own, as torchmetrics looks for torchvision once.

_TORCHVISION = """
import torch, pathlib
from torch import nn

resnet50 = vgg16 = VGG16_Weights = None  # other metrics of torchmetrics import them

class _Alexnet(nn.Module):
    def __init__(self):
        super().__init__()
        relu, pool = (lambda: nn.ReLU(inplace=True)), (lambda: nn.MaxPool2d(3, 2))
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(), nn.Conv2d(64, 192, 5, padding=2), relu(), pool(),
            nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu(),
            nn.Conv2d(256, 256, 3, padding=1), relu(), pool())

class AlexNet_Weights:
    class DEFAULT:
        url = "https://example.invalid/models/alexnet-0123abcd.pth"

def alexnet(weights=None):
    made = _Alexnet()
    if weights is not None:
        path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-0123abcd.pth"
        made.load_state_dict(torch.load(path, weights_only=True))
    return made
"""

_LPIPS = """
import sys, numpy, torch
from pathlib import Path
from PIL import Image
from loraq.strategies.metric.lpips import Lpips
import torchvision, torchmetrics

torch.set_num_threads(1)
metric = Lpips(device="cpu")
assert "alexnet-0123abcd.pth is not there" in metric.refusal(), metric.refusal()
torch.manual_seed(0)
network = torchvision.models.alexnet()
folder = Path(torch.hub.get_dir()) / "checkpoints"
folder.mkdir(parents=True)
torch.save(network.state_dict(), folder / "alexnet-0123abcd.pth")
assert metric.refusal() is None

# Equation 1, by hand: unit features of five layers, weighted by the published channels' weights, averaged over places.
path = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
heads = torch.load(path, weights_only=True, map_location="cpu")
shift = torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1)
scale = torch.tensor([.458, .448, .450]).view(1, 3, 1, 1)

def layers(picture):
    x = (torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1 - shift) / scale
    found = []
    for place, layer in enumerate(network.features):
        x = layer(x.clone())
        if place in (1, 4, 7, 9, 11):
            found.append(x / (1e-8 + (x ** 2).sum(1, keepdim=True)).sqrt())
    return found

def by_hand(first, second):
    total = 0.0
    for place, (a, b) in enumerate(zip(layers(first), layers(second))):
        weight = heads[f"lin{place}.model.1.weight"].view(1, -1, 1, 1)
        total += float((weight * (a - b) ** 2).sum(1).mean())
    return total

generator = numpy.random.default_rng(0)
pictures = [Image.fromarray(generator.integers(0, 256, (64, 72, 3), dtype=numpy.uint8)) for _ in range(3)]
with torch.no_grad():
    for other in pictures[1:]:
        found, expected = metric.measure(pictures[0], other, ""), by_hand(pictures[0], other)
        assert abs(found - expected) < 1e-5 and expected > 1e-3, (found, expected)
    assert metric.measure(pictures[0], pictures[0], "") == 0
try:
    metric.measure(*[Image.new("RGB", (16, 16))] * 2, "")
except Exception as error:
    assert "32 x 32 or more" in str(error)
else:
    raise AssertionError("a tiny picture is taken")
"""


def test_lpips_is_its_equation(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import models, transforms\n__version__ = '0.0.1'\n")
    (package / "transforms.py").touch()
    (package / "models.py").write_text(_TORCHVISION)
    information = tmp_path / "torchvision-0.0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.1\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TORCH_HOME": str(tmp_path / "torch")}
    found = subprocess.run([sys.executable, "-c", _LPIPS], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


# FID


def by_roots(first: numpy.ndarray, second: numpy.ndarray) -> float:
    """The equation as it stands, by scipy's matrix root."""
    import scipy.linalg

    means = first.mean(0) - second.mean(0)
    covariances = [numpy.cov(each, rowvar=False) for each in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return float(means @ means + numpy.trace(covariances[0] + covariances[1] - 2 * root.real))


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 60), st.integers(20, 60), st.integers(1, 8), st.integers(0, 2**32))
def test_the_distance_is_that_of_the_equation(many: int, others: int, width: int, seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    first = generator.normal(size=(many, width)) @ generator.normal(size=(width, width))
    second = generator.normal(size=(others, width)) + generator.normal(size=width)
    expected = by_roots(first, second) if width > 1 else None
    if expected is None:  # of one feature: means apart, spreads apart
        spreads = first.std(ddof=1), second.std(ddof=1)
        expected = float((first.mean() - second.mean()) ** 2 + (spreads[0] - spreads[1]) ** 2)
    assert frechet.distance(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert frechet.distance(second, first) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_distance_of_gaussians_is_known() -> None:
    """Of N(0, 1) and N(m, s²) in every direction: d (m² + (s - 1)²)."""
    generator = numpy.random.default_rng(0)
    first, second = generator.normal(size=(200_000, 4)), 1.5 + 2 * generator.normal(size=(200_000, 4))
    assert frechet.distance(first, second) == pytest.approx(4 * (1.5**2 + 1), rel=0.01)
    assert frechet.distance(first, first) == pytest.approx(0, abs=1e-9)


def test_few_pictures_with_many_features_are_measured() -> None:
    """The covariances are singular: no root of a matrix is taken."""
    generator = numpy.random.default_rng(1)
    first, second = generator.normal(size=(5, 2048)), generator.normal(size=(7, 2048))
    means = first.mean(0) - second.mean(0)
    roots = [(each - each.mean(0)) / math.sqrt(len(each) - 1) for each in (first, second)]
    product = roots[0].T @ roots[0] @ roots[1].T @ roots[1]
    trace = numpy.sqrt(numpy.linalg.eigvals(roots[0] @ (roots[1].T @ roots[1]) @ roots[0].T).real.clip(0)).sum()
    expected = means @ means + sum((each**2).sum() for each in roots) - 2 * trace
    assert product.shape == (2048, 2048)
    assert frechet.distance(first, second) == pytest.approx(expected, rel=1e-6)


class _Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Conv2d(3, 2048, 23, stride=92)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.project(pictures).mean((2, 3))


class _Inception(torch.nn.Module):
    """What clean-fid expects of its file: `layers` from pictures of 299 x 299 to 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures)


@pytest.fixture
def inception(bare: Path) -> Path:
    """A network in the place of clean-fid's Inception."""
    pytest.importorskip("cleanfid", reason="clean-fid is not installed")
    frechet._network.cache_clear()
    frechet._features.cache_clear()
    torch.manual_seed(0)
    path = frechet.torch_folder() / "inception-2015-12-05.pt"
    path.parent.mkdir(parents=True)
    torch.jit.script(_Inception().eval()).save(str(path))
    return path


def pictures(folder: Path, seeds: range) -> tuple[Path, ...]:
    folder.mkdir()
    paths = tuple(folder / f"{seed}.png" for seed in seeds)
    for path, seed in zip(paths, seeds, strict=True):
        noise(seed, 48).save(path)
    return paths


def test_fid_measures_files_as_clean_fid_does(inception: Path, bare: Path) -> None:
    drawn, real = pictures(bare / "drawn", range(5)), pictures(bare / "real", range(5, 12))
    made = PictureSet(drawn=drawn, originals=real, prompts=("",) * 5, references=real)
    network = torch.jit.load(str(inception))

    def features(paths: tuple[Path, ...]) -> numpy.ndarray:
        """Channel by channel, bicubic by Pillow in float, cut to 0 to 255 and not rounded."""
        found = []
        for path in paths:
            channels = Image.open(path).convert("RGB").split()
            resized = [
                numpy.asarray(Image.fromarray(numpy.asarray(each, numpy.float32)).resize((299, 299), Image.BICUBIC))
                for each in channels
            ]
            values = torch.from_numpy(numpy.stack(resized).clip(0, 255))[None]
            found.append(network.layers((values - 128) / 128).detach().double().numpy()[0])
        return numpy.stack(found)

    expected = frechet.distance(features(drawn), features(real))
    assert expected > 0
    assert Fid(device="cpu").refusal() is None
    assert Fid(device="cpu").measure(made) == pytest.approx(expected, rel=1e-4)
    assert Fid(reference=str(bare / "real"), device="cpu").measure(made) == pytest.approx(expected, rel=1e-4)
    assert FidOriginal(device="cpu").measure(made) == pytest.approx(expected, rel=1e-4)
    same = PictureSet(drawn=drawn, originals=drawn, prompts=("",) * 5)
    assert FidOriginal(device="cpu").measure(same) == pytest.approx(0, abs=1e-4)


def test_fid_says_what_it_lacks(inception: Path, bare: Path) -> None:
    drawn = pictures(bare / "drawn", range(3))
    made = PictureSet(drawn=drawn, originals=drawn, prompts=("",) * 3)
    assert "no real pictures" in str(Fid().objection(made))
    assert "draw more" in str(FidOriginal().objection(PictureSet(drawn=drawn[:1], originals=drawn[:1], prompts=("",))))
    assert "holds fewer than two" in str(Fid(reference=str(bare / "nothing")).refusal())
    drawn[1].write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png: cannot be read as a picture"):
        FidOriginal(device="cpu").measure(made)
    inception.unlink()
    assert "(--download) fetches it" in str(Fid().refusal())


# ImageReward


@pytest.fixture
def rewarding(bare: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(Python, weights' folder) of an environment with a stand-in for the package, which scores by brightness."""
    package, weights = bare / "packages", bare / "weights"
    package.mkdir()
    weights.mkdir()
    for name in ("ImageReward.pt", "med_config.json"):
        (weights / name).write_text("{}")
    words = bare / "hub" / "models--bert-base-uncased"
    for path, text in (("refs/main", "abc"), ("snapshots/abc/vocab.txt", "[PAD]")):
        (words / path).parent.mkdir(parents=True)
        (words / path).write_text(text)
    (package / "ImageReward.py").write_text(
        textwrap.dedent(
            """
            import os
            from PIL import Image

            class Model:
                def score(self, prompt, path):
                    print("a library that prints")
                    if prompt == "fail":
                        raise ValueError("no score for it")
                    extremes = Image.open(path).convert("L").getextrema()
                    return len(prompt) + extremes[1] / 1000

            def load(name, device=None, download_root=None, med_config=None):
                assert os.environ["HF_HUB_OFFLINE"] == "1" and open(name).read() and open(med_config).read()
                return Model()
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(package))
    return Path(sys.executable), weights


def test_image_reward_runs_in_a_process_of_its_own(rewarding: tuple[Path, Path]) -> None:
    python, weights = rewarding
    metric = ImageReward(python=str(python), folder=str(weights))
    assert metric.refusal() is None
    bright = Image.new("RGB", (8, 8), "white")
    assert [metric.measure(bright, bright, prompt) for prompt in ("ab", "abc")] == [2.255, 3.255]
    with pytest.raises(LoraqError, match=r"its process ended \(ValueError: no score for it\)"):
        metric.measure(bright, bright, "fail")


def test_image_reward_says_what_it_lacks(rewarding: tuple[Path, Path]) -> None:
    python, weights = rewarding
    assert "is no program" in str(ImageReward(python="no-such-python").refusal())
    assert "ImageReward.pt is not there" in str(ImageReward(python=str(python), folder=str(weights / "x")).refusal())
    words = weights.parent / "hub" / "models--bert-base-uncased" / "snapshots" / "abc" / "vocab.txt"
    words.rename(words.with_suffix(".away"))
    assert "bert-base-uncased, which ImageReward reads, is not" in str(
        ImageReward(python=str(python), folder=str(weights)).refusal()
    )
    words.with_suffix(".away").rename(words)
    broken = weights.parent / "broken"
    broken.write_text(f"#!/bin/sh\necho 'ImportError: cannot import timm' >&2\nexec {sys.executable} -c 'exit(1)'\n")
    broken.chmod(0o755)
    reason = str(ImageReward(python=str(broken), folder=str(weights)).refusal())
    assert "cannot import ImageReward (ImportError: cannot import timm)" in reason


# Captions


def test_a_caption_is_read_back() -> None:
    for scene in shapes.ALL_SCENES:
        for phrasing in (0, 1):
            assert shapes.scene_of(shapes.caption(scene, phrasing)) == scene
    assert shapes.scene_of("a small red ring on purple") is None


def test_captions_hold_of_drawn_scenes_and_not_of_others() -> None:
    scenes = shapes.ALL_SCENES[::37]
    drawn = shapes.draw(scenes, numpy.random.default_rng(0))
    metric = Caption()
    right = [
        metric.measure(Image.fromarray(picture), Image.fromarray(picture), shapes.caption(scene))
        for scene, picture in zip(scenes, drawn, strict=True)
    ]
    assert {*right} <= {0.0, 1.0}
    assert sum(right) >= 0.95 * len(right)
    wrong = [
        metric.measure(Image.fromarray(picture), Image.fromarray(picture), shapes.caption(scene))
        for scene, picture in zip(scenes, drawn[1:], strict=False)
    ]
    assert sum(wrong) == 0


def test_other_prompts_and_sizes_are_no_captions() -> None:
    metric = Caption()
    paths = (Path("0.png"),)
    assert isinstance(metric, AbstractParticular)
    assert metric.objection(PictureSet(drawn=paths, originals=paths, prompts=("a small red ring on white",))) is None
    assert "is none." in str(metric.objection(PictureSet(drawn=paths, originals=paths, prompts=("a lighthouse",))))
    with pytest.raises(InputError, match="64 x 64"):
        metric.measure(noise(0), noise(0), "a small red ring on white")


@given(st.integers(1, 300), st.data())
def test_a_share_has_wilsons_interval(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    found = share_interval([1.0] * right + [0.0] * (total - right), [str(each) for each in range(total)])
    assert found.mean == pytest.approx(right / total)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.high - found.low > 0, "not a point at 0 or 1 either"
    twice = share_interval([1.0] * right + [0.0] * (total - right), [str(each // 2) for each in range(total)])
    assert twice.low is not None
    assert twice.low <= found.low + 1e-12, "two pictures of a prompt are no two draws"


# All of it, by the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline in `model`, and two quantized ones."""
    folder = tmp_path_factory.mktemp("home")
    models.saved_pipeline(folder / "model")
    for name in ("svd", "none"):
        done(loraq("run", models.write_recipe(folder / f"{name}.toml", folder / "model", folder / name, low_rank=name)))
    return folder


def call() -> list[str]:
    return [part for name, value in models.CALL.items() for part in ("--call", f"{name}={json.dumps(value)}")]


def test_options_reach_the_metrics_and_sets_have_no_interval(
    home: Path, inception: Path, small_clip: Path, tmp_path: Path
) -> None:
    arguments = (
        *("evaluate", home / "svd", home / "none", "--against", home / "model", "--prompt", "a red ring"),
        *("--prompt", "a blue square", "--count", 3, *call(), "--metric", "clip_score", "--metric", "fid_original"),
        *("--set", f"clip_score.model={small_clip}", "--output", tmp_path / "out"),
    )
    report: dict[str, Any] = json.loads(done(loraq(*arguments, "--json")))
    means = {(row["metric"], row["pipeline"]): row for row in report["means"]}
    assert {*means} == {
        *(("clip_score", name) for name in ("original", "svd", "none")),
        *(("fid_original", name) for name in ("svd", "none")),
    }
    whole = {name: means["fid_original", name]["mean"] for name in ("svd", "none")}
    assert all(value > 0 for value in whole.values())
    assert means["fid_original", "svd"]["low"] is None
    differences = {(row["metric"], row["pipeline"], row["subtracted"]): row for row in report["differences"]}
    assert differences["fid_original", "svd", "none"]["mean"] == pytest.approx(whole["svd"] - whole["none"])
    assert ("fid_original", "svd", "original") not in differences
    text = done(loraq(*arguments))
    assert "fid_original of 3 pictures is not that of 5000" in text
    found = loraq(*arguments, "--require", "fid_original <= 0", "--require", "fid_original.low <= 5")
    assert found.code == 1
    assert "svd: fid_original is" in found.err
    assert "fid_original.low has no interval, and" in found.err


def test_a_data_sets_pictures_are_what_fid_compares_with(home: Path, inception: Path, tmp_path: Path) -> None:
    """The original has a figure as well, and those of the files that were kept are the same."""
    names = [f"n{number}" for number in range(6)]
    table = {name: {"category": "c", "prompt": f"a red ring {name}"} for name in names}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    for seed, name in enumerate(names):
        noise(seed, 24).save(tmp_path / f"{name}.jpg")
    arguments = ("evaluate", home / "svd", "--against", home / "model", "--prompts", f"mjhq:{tmp_path}", "--count", 4)
    out = tmp_path / "out"
    report = json.loads(done(loraq(*arguments, *call(), "--metric", "fid", "--output", out, "--json")))
    means = {row["pipeline"]: row["mean"] for row in report["means"]}
    chosen = prompt_set(f"mjhq:{tmp_path}", 4)
    for label, mean in means.items():
        drawn = tuple(out / label / f"{place:05}.png" for place in range(4))
        made = PictureSet(drawn=drawn, originals=drawn, prompts=chosen.prompts, references=chosen.references)
        assert Fid(device="cpu").measure(made) == mean
    assert {*means} == {"original", "svd"}
    assert report["differences"][0]["mean"] == pytest.approx(means["svd"] - means["original"])


def test_what_cannot_judge_these_pictures_is_left_out(home: Path) -> None:
    arguments = (
        "evaluate",
        home / "svd",
        "--against",
        home / "model",
        "--prompt",
        "a lighthouse",
        "--count",
        1,
        *call(),
    )
    report = json.loads(done(loraq(*arguments, "--metric", "psnr", "--metric", "caption", "--json")))
    assert "'a lighthouse' is none." in report["left_out"]["caption"]
    assert "no metric is left: caption: it reads captions" in refused(loraq(*arguments, "--metric", "caption"))
    found = loraq(*arguments, "--metric", "psnr", "--metric", "caption", "--require", "caption >= 0.9")
    assert found.code == 1
    assert "caption was not measured (it reads captions" in found.err


def test_options_that_no_metric_has_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"--set lpips\.nett: unknown key 'nett' .*did you mean 'net'"):
        load_metrics(("lpips",), options={"lpips": {"nett": "vgg"}}, where="--set")
    with pytest.raises(RecipeError, match="--set lpips: it is not among the metrics, psnr"):
        load_metrics(("psnr",), options={"lpips": {"net": "vgg"}}, where="--set")
    with pytest.raises(InputError, match="expected METRIC"):
        evaluation.metric_tables(["lpips=vgg"], "--set")
    tables = evaluation.metric_tables(["lpips.net=vgg", "fid.download=true", "fid.reference=a/b"], "--set")
    assert tables == {"lpips": {"net": "vgg"}, "fid": {"download": True, "reference": "a/b"}}


def test_downloading_is_asked_for(bare: Path) -> None:
    metrics, _ = load_metrics(("clip_score", "psnr"), download=True)
    assert metrics["clip_score"] == ClipScore(download=True)
    assert Lpips().download is False
