"""`loraq verify`: a whole folder passes, whatever is spoilt is named, and the source is the right one or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models
from command import done, loraq, process, refused
from loraq.layout import Layout
from loraq.linear import PackedLinear
from loraq.verify import error_of, verify

LAYER = "transformer_blocks.0.attn1.to_q"
SHARD = "transformer/diffusion_pytorch_model.safetensors"
SHARED = """
[[layers]]
match = "*"
low_rank.share_down = true
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline in `model`, quantized in `out`, and with one `down` for q, k and v in `shared`."""
    folder = tmp_path_factory.mktemp("home")
    models.saved_pipeline(folder / "model", layers=1)
    for name, extra in (("out", ""), ("shared", SHARED)):
        done(loraq("run", models.write_recipe(folder / f"{name}.toml", folder / "model", folder / name, extra=extra)))
    return folder


@pytest.fixture
def out(home: Path, tmp_path: Path) -> Path:
    """A quantized folder to spoil."""
    return models.copy_of(home / "out", tmp_path / "out")


def offset_of(shard: Path, tensor: str) -> int:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length + int(json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def found(folder: Path, *arguments: object, code: int = 1) -> dict[str, list[str]]:
    """What `verify --json` names as faulty, and why."""
    finished = loraq("verify", folder, "--json", *arguments)
    assert finished.code == code, finished
    plain = json.loads(finished.out)
    assert plain["ok"] is (code == 0)
    return {unit["name"]: unit["faults"] for unit in plain["units"] if unit["faults"]}


@pytest.mark.parametrize("name", ["out", "shared"])
def test_a_whole_folder_passes_and_its_errors_are_those_recorded(home: Path, name: str) -> None:
    verified = verify(home / name)
    layers = [unit for unit in verified.units if unit.is_layer]
    assert len(layers) == 10
    assert (verified.faulty, verified.notes) == ((), ())
    recorded = json.loads((home / name / "loraq.json").read_text())["report"]["layers"]
    for unit, record in zip(layers, recorded, strict=True):
        assert (unit.name, unit.recorded_error) == (record["name"], record["error_after"])
        assert unit.found_error == pytest.approx(record["error_after"], rel=1e-5)
    text = done(loraq("verify", home / name))
    assert "10 of 10 layers and" in text
    assert f"Errors of 10 layers were taken anew from {home / 'model'}" in text


def test_errors_are_those_of_the_dequantized_layer(home: Path) -> None:
    """Transforms undone, so by another way: a rotation changes no norm."""
    config = json.loads((home / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    layout = Layout.from_plain(config["layouts"][config["layers"][LAYER]])
    tensors = load_file(home / "out" / SHARD)
    stored = {key: tensors[f"{LAYER}.{key}"] for key in layout.stored()}
    with safe_open(home / "model" / SHARD, framework="pt") as file:
        weight = file.get_tensor(f"{LAYER}.weight")
    plain = PackedLinear(layout, stored).dequantized().weight
    expected = float((plain - weight.float()).norm() / weight.float().norm())
    assert error_of(weight, layout, stored) == pytest.approx(expected, rel=1e-4)


def test_a_flipped_bit_names_its_layer(out: Path) -> None:
    flip(out / SHARD, offset_of(out / SHARD, f"{LAYER}.main.codes") + 3)
    faults = found(out)
    assert list(faults) == [LAYER]
    assert faults[LAYER][0] == "its bytes are not those that were written"
    flipped = process("verify", out)
    assert flipped.code == 1
    assert LAYER in flipped.out
    assert "9 of 10 layers" in flipped.out
    expected = f"error: {out}: 1 of 19 checks failed ('{LAYER}'); quantize or copy the folder anew.\n"
    assert flipped.err.split(" of ")[0] == expected.split(" of ")[0]
    assert flipped.err.endswith(f"checks failed ('{LAYER}'); quantize or copy the folder anew.\n")


def test_a_changed_scale_is_seen_by_its_error_where_no_digests_are_recorded(out: Path) -> None:
    path = out / "loraq.json"
    provenance = json.loads(path.read_text())
    del provenance["digests"]
    path.write_text(json.dumps(provenance))
    assert found(out, code=0) == {}
    assert "records no digests, it was written by an older LoRaQ" in done(loraq("verify", out))
    tensors = load_file(out / SHARD)
    tensors[f"{LAYER}.main.scales"] = tensors[f"{LAYER}.main.scales"] + 64  # half as large again, as bfloat16
    save_file(tensors, out / SHARD, metadata={"format": "pt"})
    [(name, [fault])] = found(out).items()
    assert name == LAYER
    assert "its error is 0." in fault
    assert ", recorded is 0." in fault


@pytest.mark.parametrize(
    ("spoil", "named", "why"),
    [
        (lambda out: flip(out / SHARD, offset_of(out / SHARD, "proj_out.weight")), "tensors that are kept", "bytes"),
        (lambda out: flip(out / "transformer" / "config.json", 5), "config.json", "bytes"),
        (lambda out: flip(out / "vae" / SHARD.split("/")[1], 5000), "vae/" + SHARD.split("/")[1], "not the source's"),
        (lambda out: (out / "scheduler" / "scheduler_config.json").unlink(), "scheduler/sched", "copy is missing"),
    ],
    ids=["kept", "config", "copied", "missing"],
)
def test_everything_else_is_watched_too(out: Path, spoil: Callable[[Path], Any], named: str, why: str) -> None:
    spoil(out)
    [(name, [fault])] = found(out).items()
    assert name.startswith(named)
    assert why in fault


def test_a_shard_cut_off_or_gone_fails_every_layer(out: Path) -> None:
    shard = out / SHARD
    shard.write_bytes(shard.read_bytes()[:-100])
    faults = found(out)
    assert faults[shard.name][0].startswith("it cannot be read (")
    assert len(faults) == 10 + 2
    shard.unlink()
    assert "of its" in found(out)[LAYER][0]


def test_without_the_source_digests_alone_are_checked(home: Path, out: Path, tmp_path: Path) -> None:
    path = out / "loraq.json"
    provenance = json.loads(path.read_text())
    provenance["recipe"]["model"]["folder"] = str(tmp_path / "gone")
    path.write_text(json.dumps(provenance))
    assert "Errors were not compared, the recorded source is not there" in done(loraq("verify", out))
    assert "Errors of 10 layers" in done(loraq("verify", out, "--against", home / "model"))
    assert "Errors of 10 layers" in done(loraq("verify", out, "--against", home / "model" / "transformer"))
    flip(out / SHARD, offset_of(out / SHARD, f"{LAYER}.up.codes"))
    assert list(found(out)) == [LAYER]


def test_another_source_is_refused_and_a_changed_one_is_told(home: Path, out: Path, tmp_path: Path) -> None:
    other = models.copy_of(home / "model", tmp_path / "other")
    tensors = load_file(other / SHARD)
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"] * 2
    save_file(tensors, other / SHARD, metadata={"format": "pt"})
    first = f"error: --against {other}: the weight of '{LAYER}' is not the one that was quantized; give the source of"
    assert refused(loraq("verify", out, "--against", other)).startswith(first)
    provenance = json.loads((out / "loraq.json").read_text())
    provenance["recipe"]["model"]["folder"] = str(other)
    (out / "loraq.json").write_text(json.dumps(provenance))
    assert f"{other} holds another weight of '{LAYER}' now" in done(loraq("verify", out))
    sentence = refused(loraq("verify", out, "--against", tmp_path / "nothing"))
    assert sentence == f"error: model.folder: there is no folder {tmp_path / 'nothing'}.\n"


def test_a_later_layer_of_another_source_is_told_as_well(home: Path, out: Path, tmp_path: Path) -> None:
    other = models.copy_of(home / "model", tmp_path / "other")
    tensors = load_file(other / SHARD)
    tensors["transformer_blocks.0.ff.net.2.weight"] = tensors["transformer_blocks.0.ff.net.2.weight"] * 2
    save_file(tensors, other / SHARD, metadata={"format": "pt"})
    faults = found(out, "--against", other)
    assert faults == {"transformer_blocks.0.ff.net.2": ["the source's weight is not the one that was quantized"]}


def test_a_folder_without_loraq_json_is_judged_by_its_structure(home: Path, out: Path) -> None:
    (out / "loraq.json").unlink()
    assert "There is no loraq.json: only the files' structure was checked." in done(loraq("verify", out))
    sentence = refused(loraq("verify", out, "--against", home / "model"))
    assert f"--against {home / 'model'}: {out} has no loraq.json" in sentence
    tensors = load_file(out / SHARD)
    tensors[f"{LAYER}.main.codes"] = tensors[f"{LAYER}.main.codes"].to(torch.int64)
    save_file(tensors, out / SHARD, metadata={"format": "pt"})
    assert "is not of the shape and type that config.json says" in found(out)[LAYER][0]


def test_a_folder_that_is_not_packed_is_refused(home: Path, tmp_path: Path) -> None:
    for folder in (home / "model", tmp_path / "nothing"):
        assert refused(loraq("verify", folder)) == f"error: {folder}: nothing in it was packed by LoRaQ.\n"
    shutil.copytree(home / "out", tmp_path / "bad")
    (tmp_path / "bad" / "loraq.json").write_text("[]")
    assert "loraq.json: expected a JSON object" in refused(loraq("verify", tmp_path / "bad"))
