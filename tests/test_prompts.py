"""Prompt sets as the field's tables draw them: which prompts, from which noise, with which real pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import models
from command import done, loraq, refused
from loraq.errors import InputError
from loraq.prompts import SETTINGS, chosen_names, is_prompt_set, prompt_set, published_call, seed_of

NAMES = [f"{number:04x}" for number in range(40)]


@pytest.fixture
def mjhq(tmp_path: Path) -> Path:
    """A folder laid out as MJHQ-30K, with forty prompts."""
    table = {name: {"category": f"c{place % 3}", "prompt": f"a red ring {name}"} for place, name in enumerate(NAMES)}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    for name, entry in table.items():
        path = tmp_path / "mjhq30k_imgs" / entry["category"] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
    return tmp_path


@given(st.text(max_size=60))
def test_a_names_seed_is_its_polynomial(name: str) -> None:
    exact = sum(ord(character) * 31 ** (len(name) - 1 - place) for place, character in enumerate(name))
    assert seed_of(name) == exact % (10**9 + 7)
    assert 0 <= seed_of(name) < 2**31


def test_seeds_that_were_worked_out() -> None:
    assert [seed_of(name) for name in ("", "a", "ab")] == [0, 97, 97 * 31 + 98]


def test_the_rule_takes_the_first_of_a_fixed_shuffle_sorted() -> None:
    shuffled = list(NAMES)
    random.Random(0).shuffle(shuffled)
    assert chosen_names(NAMES, 7) == sorted(shuffled[:7])
    assert {*chosen_names(NAMES, 7)} < {*chosen_names(NAMES, 12)}, "a larger count holds a smaller one"
    assert chosen_names(NAMES, 40) == NAMES


def test_mjhq(mjhq: Path) -> None:
    found = prompt_set(f"mjhq:{mjhq}", 9)
    assert list(found.names) == chosen_names(NAMES, 9)
    assert found.prompts == tuple(f"a red ring {name}" for name in found.names)
    assert found.seeds == tuple(seed_of(name) for name in found.names)
    assert [path.stem for path in found.references] == list(found.names)
    assert all(path.is_file() for path in found.references)


def test_sdci(tmp_path: Path) -> None:
    (tmp_path / "sDCI.yaml").write_text("sa_1: 'A dog: it sits.'\nsa_2: a cat\n")
    found = prompt_set(f"sdci:{tmp_path}", 2)
    assert dict(zip(found.names, found.prompts, strict=True)) == {"sa_1": "A dog: it sits.", "sa_2": "a cat"}
    assert found.references == (), "no pictures are there"


def test_what_names_a_data_set() -> None:
    assert is_prompt_set("mjhq:folder")
    assert not any(is_prompt_set(text) for text in ("prompts.txt", "mjhq:", "coco:folder", "C:/prompts.txt"))
    with pytest.raises(InputError, match="mjhq:FOLDER or sdci:FOLDER"):
        prompt_set("coco:folder", 1)


def test_faults_are_sentences(mjhq: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"41 prompts are asked for and there are 40; lower the count"):
        prompt_set(f"mjhq:{mjhq}", 41)
    next(mjhq.rglob("*.jpg")).unlink()
    with pytest.raises(InputError, match="1 of 40 pictures are missing"):
        prompt_set(f"mjhq:{mjhq}", 40)
    with pytest.raises(InputError, match=r"meta_data\.json: cannot be read \(No such file"):
        prompt_set(f"mjhq:{tmp_path / 'nothing'}", 1)
    for text in ("{", "[]", '{"a": 1}', '{"a": {"category": "b"}}'):
        (mjhq / "meta_data.json").write_text(text)
        with pytest.raises(InputError, match=r"meta_data\.json"):
            prompt_set(f"mjhq:{mjhq}", 1)
    for text in ("a: [", "a: 1", "- a"):
        (tmp_path / "sDCI.yaml").write_text(text)
        with pytest.raises(InputError, match=r"sDCI\.yaml"):
            prompt_set(f"sdci:{tmp_path}", 1)


def test_published_settings_are_for_the_published_models(tmp_path: Path) -> None:
    models.saved_pipeline(tmp_path / "model")
    assert published_call(tmp_path / "model") == {}, "it draws 16 x 16"
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 512}))
    assert published_call(tmp_path / "model") == SETTINGS["PixArtSigmaPipeline"]
    assert published_call(tmp_path / "nothing") == {}


def test_the_command_draws_a_data_set_from_the_noise_of_its_names(mjhq: Path, tmp_path: Path) -> None:
    model = models.saved_pipeline(tmp_path / "model")
    copy = models.copy_of(model, tmp_path / "copy")
    settings = [part for name, value in models.CALL.items() for part in ("--call", f"{name}={json.dumps(value)}")]
    arguments = ("evaluate", copy, "--against", model, "--prompts", f"mjhq:{mjhq}", "--metric", "psnr", *settings)
    text = done(loraq(*arguments, "--count", 3, "--output", tmp_path / "out"))
    assert text.startswith("3 pictures of 3 prompts, seeds by name, ")
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    found = prompt_set(f"mjhq:{mjhq}", 3)
    assert [(row["prompt"], row["seed"]) for row in rows] == list(zip(found.prompts, found.seeds, strict=True))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seeds"] == list(found.seeds)
    assert "there are 40; lower the count" in refused(loraq(*arguments))
