"""Safetensors files written in any order: the bytes that safetensors and diffusers would write themselves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

import models
from loraq.checkpoint import FilePlan, ShardWriter, index_text, plan_file, plan_files, sync_tree, write_text
from loraq.errors import CheckpointError
from loraq.pipeline import tensor_bytes
from loraq.source import DTYPES, TensorSpec, read_header

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["a.weight", "a.main.codes", "b.weight", 'quo"te', "back\\slash", "ümlaut", "\x1f", "日本"]
)
SPECS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.builds(TensorSpec, st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    min_size=1,
    max_size=12,
)


def tensors_for(specs: dict[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes and dtypes, whose bytes tell one from another."""
    made = {}
    for place, (name, spec) in enumerate(specs.items()):
        octets = (torch.arange(spec.bytes) * 31 + place).to(torch.uint8)
        if spec.dtype == "BOOL":
            octets = octets % 2
        made[name] = octets.view(getattr(torch, DTYPES[spec.dtype][0])).reshape(spec.shape)
    return made


def written(folder: Path, files: tuple[FilePlan, ...], tensors: dict[str, torch.Tensor]) -> None:
    with ShardWriter(folder, files) as writer:
        for name in reversed(tensors):
            writer.write({name: tensor_bytes(tensors[name])})
        for name, tensor in tensors.items():
            assert writer.read(name) == bytes(tensor_bytes(tensor))
        writer.finish()


@given(specs=SPECS)
def test_a_file_has_safetensors_own_bytes(
    specs: dict[str, TensorSpec], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = tensors_for(specs)
    plan = plan_file("x.safetensors", specs)
    expected = save(tensors, metadata={"format": "pt"})
    assert plan.header == expected[: len(plan.header)]
    assert plan.size == len(expected)
    folder = tmp_path_factory.mktemp("file")
    written(folder, (plan,), tensors)
    assert (folder / "x.safetensors").read_bytes() == expected
    assert os.listdir(folder) == ["x.safetensors"]
    assert read_header(folder / "x.safetensors") == specs


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_named_sized_and_sorted_as_safetensors_does(dtype: str) -> None:
    torch_dtype = getattr(torch, DTYPES[dtype][0])
    assert torch_dtype.itemsize == DTYPES[dtype][1]
    specs = {"a": TensorSpec(dtype, (3,))} | {other: TensorSpec(other, (1, 2)) for other in DTYPES}
    assert save(tensors_for(specs), metadata={"format": "pt"}).startswith(plan_file("x", specs).header)


@pytest.mark.parametrize("shard_size", ["20KB", "100KB", "10GB"])
def test_shards_and_index_are_those_of_diffusers(tmp_path: Path, shard_size: str) -> None:
    model = models.transformer()
    model.save_pretrained(tmp_path / "expected", max_shard_size=shard_size)
    tensors = model.state_dict()
    dtypes = {f"torch.{name}": key for key, (name, _) in DTYPES.items()}
    specs = {name: TensorSpec(dtypes[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()}
    files = plan_files(specs, shard_size)
    written(tmp_path / "found", files, tensors)
    index = index_text(files)
    if index is not None:
        (tmp_path / "found" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    expected = models.tensor_files(tmp_path / "expected")
    del expected["config.json"]
    assert models.tensor_files(tmp_path / "found") == expected
    assert (len(files) > 1) == (shard_size != "10GB") == (index is not None)


def test_files_are_partial_until_finished_and_taken_up_again(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("F32", (4,)), "b": TensorSpec("F32", (2, 2))}
    tensors = tensors_for(specs)
    files = (plan_file("one.safetensors", {"a": specs["a"]}), plan_file("two.safetensors", {"b": specs["b"]}))
    with ShardWriter(tmp_path, files) as writer:
        writer.write({"a": tensor_bytes(tensors["a"])})
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors.partial", "two.safetensors.partial"]
    assert [(tmp_path / name).stat().st_size for name in sorted(os.listdir(tmp_path))] == [file.size for file in files]
    (tmp_path / "one.safetensors.partial").rename(tmp_path / "one.safetensors")  # as if killed between two renames
    with ShardWriter(tmp_path, files) as writer:
        assert writer.read("a") == bytes(tensor_bytes(tensors["a"]))
        writer.write({"b": tensor_bytes(tensors["b"])})
        writer.finish()
    for file, name in zip(files, specs, strict=True):
        with safe_open(tmp_path / file.name, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensors[name])


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path, (plan_file("x", {"a": TensorSpec("F32", (4,))}),)) as writer,
        pytest.raises(CheckpointError, match="'a' has 8 bytes, planned were 16"),
    ):
        writer.write({"a": bytes(8)})


def test_no_room_is_told_and_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"there is no room for [\d,]+ bytes \(No space left on device\)"):
        ShardWriter(tmp_path, (plan_file("x", {"a": TensorSpec("F32", (4,))}),)).__enter__()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_tree_is_synced_to_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    sync_tree(tmp_path)
    assert set(synced) == {str(tmp_path / name) for name in (".", "a", "a/b", "a/b/file")}


def test_the_index_counts_all_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    save_file(tensors, tmp_path / "x.safetensors")
    text = index_text(plan_files(read_header(tmp_path / "x.safetensors"), 40))
    assert text is not None
    found = json.loads(text)
    assert found["metadata"] == {"total_size": 80}
    assert len(set(found["weight_map"].values())) == 2
