"""Third parties: distributions of their own, installed with pip, that serve recipes and checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import PixArtTransformer2DModel

import models
from command import done, loraq, process, refused
from loraq import registry
from loraq.errors import CheckpointError

PLUGINS = Path(__file__).parent / "plugins"
CLIP = """
[[stage]]
kind = "clip"
deviations = 1.5
"""


def installed(name: str, folder: Path) -> Path:
    """Install a plugin with pip, without the network, into a folder of its own. Returns what PYTHONPATH needs."""
    copy = shutil.copytree(PLUGINS / name, folder / "source" / name)  # pip builds in the tree
    target = folder / name
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", target, copy], check=True)
    return target


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a lone component, a recipe for it that needs the plugin, and one that does not."""
    folder = tmp_path_factory.mktemp("plugins")
    models.transformer(layers=1).save_pretrained(folder / "model")
    models.write_recipe(folder / "plain.toml", folder / "model", folder / "plain")
    recipe = models.write_recipe(folder / "recipe.toml", folder / "model", folder / "out", extra=CLIP)
    recipe.write_text(recipe.read_text().replace('strategy = "rtn"', 'strategy = "nf4"', 1))
    return folder


@pytest.fixture(scope="module")
def nf4(home: Path) -> str:
    return str(installed("loraq-nf4", home / "installed"))


@pytest.fixture(scope="module")
def both(home: Path, nf4: str) -> str:
    return f"{nf4}:{installed('loraq-rival', home / 'installed')}"


@pytest.fixture(scope="module")
def checkpoint(home: Path, nf4: str) -> Path:
    """The recipe's result, made by the command in a process that has the plugin."""
    assert "done in" in done(process("run", home / "recipe.toml", PYTHONPATH=nf4))
    return home / "out"


def _line(listed: str, kind: str) -> str:
    """What `loraq list` says of a kind."""
    return next(line for line in listed.splitlines() if line.startswith(kind))


@pytest.mark.slow
def test_a_plugin_appears_in_the_list_with_its_distribution(nf4: str) -> None:
    assert "nf4" not in done(process("list"))
    listed = done(process("list", PYTHONPATH=nf4))
    assert ", nf4 (loraq-nf4 0.3), " in _line(listed, "main_quantizer")
    assert "clip (loraq-nf4 0.3)" in listed
    rows = json.loads(done(process("list", "main_quantizer", "--json", PYTHONPATH=nf4)))
    assert next(row for row in rows if row["name"] == "nf4") == {
        "name": "nf4",
        "summary": "NF4 codes with one scale a group.",
        "distribution": "loraq-nf4",
        "version": "0.3",
    }
    assert "  group = 64" in done(process("list", "main_quantizer", "nf4", PYTHONPATH=nf4))


@pytest.mark.slow
def test_a_recipe_names_the_plugins_strategy_and_stage(home: Path, nf4: str) -> None:
    assert done(process("check", home / "recipe.toml", PYTHONPATH=nf4)).endswith(
        "fine; pre_transform hadamard -> main_quantizer nf4 -> low_rank svd -> branch_quantizer rtn -> clip\n"
    )
    setting = ("--set", "clip.deviations=-1")
    assert "stage[4]: 'deviations' must be > 0: -1" in refused(
        process("check", home / "recipe.toml", *setting, PYTHONPATH=nf4)
    )
    without = refused(process("check", home / "recipe.toml"))
    assert "stage[1].strategy: no main quantizer called 'nf4'; on offer: 'gptq', " in without
    assert "stage[4].kind: no stage called 'clip'; on offer: " in without


@pytest.mark.slow
def test_the_checkpoint_says_what_it_needs(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert config["plugins"] == {"loraq-nf4": "0.3"}
    assert {layout["main"]["format"] for layout in config["layouts"]} == {"nf4"}
    provenance = json.loads((checkpoint / "loraq.json").read_text())
    assert provenance["fingerprint"]["versions"]["loraq-nf4"] == "0.3"
    assert provenance["recipe"]["stage"][4] == {"kind": "clip", "name": "clip", "deviations": 1.5}


COMPUTES = """
import sys
import torch, loraq
from diffusers import PixArtTransformer2DModel
from torch import nn

from loraq_nf4 import NormalFloat

found = PixArtTransformer2DModel.from_pretrained(sys.argv[1])
whole = PixArtTransformer2DModel.from_pretrained(sys.argv[2])
torch.manual_seed(0)
inputs = {
    "hidden_states": torch.randn(1, 4, 8, 8),
    "encoder_hidden_states": torch.randn(1, 3, 32),
    "timestep": torch.tensor([5]),
    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
}
with torch.no_grad():
    first, second = found(**inputs).sample, whole(**inputs).sample
assert torch.isfinite(first).all()
difference = float((first - second).norm() / second.norm())
assert 0 < difference < 0.9, difference

main = loraq.stage("main_quantizer", "nf4", activation="none")
assert main.strategy == NormalFloat(activation="none")
for deviations in (1.5, 0.5):
    torch.manual_seed(1)
    layer = nn.Linear(64, 64)
    bound = deviations * float(layer.weight.detach().std())
    module = nn.Sequential(layer)
    loraq.Pipeline([loraq.stage("clip", deviations=deviations), main]).quantize(module)
    largest = float(module[0].dequantized_weight().abs().max())
    assert 0.97 * bound <= largest <= 1.03 * bound, (largest, bound)

try:
    loraq.stage("clip", deviation=3)
except loraq.LoraqError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_checkpoint_loads_and_computes_and_the_stage_works(checkpoint: Path, home: Path, nf4: str) -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-c", COMPUTES, checkpoint, home / "model"],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": nf4, "PATH": "", "HOME": str(home)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout == (
        "stage 'clip'.deviation: unknown key 'deviation' (stage clip knows deviations); did you mean 'deviations'?\n"
    )


@pytest.mark.slow
def test_without_the_plugin_loading_names_it_and_its_distribution(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        PixArtTransformer2DModel.from_pretrained(checkpoint)
    sentence = str(caught.value)
    assert sentence.startswith(
        "this checkpoint needs a plugin that is missing (loraq-nf4 0.3): no format called 'nf4';"
    )
    assert sentence in refused(loraq("inspect", checkpoint))


@pytest.mark.slow
def test_two_distributions_that_offer_one_name_are_refused_and_both_named(home: Path, both: str) -> None:
    sentence = refused(process("check", home / "recipe.toml", PYTHONPATH=both))
    assert "stage[1].strategy: 'nf4' in loraq.main_quantizer is offered twice, by " in sentence
    for offer in ("loraq-nf4 0.3 (loraq_nf4:NormalFloat)", "loraq-rival 1.0 (loraq_rival:NormalFloat)"):
        assert offer in sentence
    assert sentence.endswith("; uninstall one of them.\n")
    assert "offered twice" in refused(process("list", "main_quantizer", "nf4", PYTHONPATH=both))


@pytest.mark.slow
def test_everything_else_still_works_beside_the_quarrel(home: Path, both: str) -> None:
    listed = done(process("list", PYTHONPATH=both))
    assert "nf4 (refused: see `loraq list main_quantizer`), " in _line(listed, "main_quantizer")
    rows = json.loads(done(process("list", "main_quantizer", "--json", PYTHONPATH=both)))
    summaries = {row["name"]: row["summary"] for row in rows}
    assert summaries.keys() == {*registry.names("loraq.main_quantizer"), "nf4"}
    assert summaries["nf4"].startswith("refused: 'nf4' in loraq.main_quantizer is offered twice, by ")
    assert "fine; " in done(process("check", home / "plain.toml", PYTHONPATH=both))


@pytest.mark.slow
def test_a_plugin_that_cannot_be_imported_is_named_and_alone_refused(home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "loraq_broken-1.2.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: loraq-broken\nVersion: 1.2\n")
    (broken / "entry_points.txt").write_text(
        "[loraq.main_quantizer]\nbroken = loraq_broken:Nothing\nodd = json:dumps\n[loraq.format]\nodd = json:dumps\n"
    )
    path = str(tmp_path)
    listed = json.loads(done(process("list", "main_quantizer", "--json", PYTHONPATH=path)))
    assert {row["name"] for row in listed} == {*registry.names("loraq.main_quantizer"), "broken", "odd"}
    assert listed[0]["summary"].startswith("refused: 'broken' in loraq.main_quantizer, offered by loraq-broken 1.2 as")
    for setting, sentence in (
        ("strategy=broken", "stage[1].strategy: 'broken' in loraq.main_quantizer, offered by loraq-broken 1.2 as"),
        (
            "strategy=odd",
            "stage[1].strategy: 'odd' in loraq.main_quantizer, offered by loraq-broken as json:dumps, is not",
        ),
        (
            "weight=odd",
            "stage[1].weight: 'odd' in loraq.format, offered by loraq-broken as json:dumps, is not a number",
        ),
    ):
        found = refused(process("check", home / "plain.toml", "--set", f"main_quantizer.{setting}", PYTHONPATH=path))
        assert sentence in found
