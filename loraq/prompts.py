"""Prompt sets: what is drawn, from which noise, and the real pictures that belong to it.

`mjhq:FOLDER` is MJHQ-30K (meta_data.json and the pictures, wherever below FOLDER they lie), `sdci:FOLDER` the
summarised DCI captions (sDCI.yaml), both as the field's tables use them since SVDQuant (arXiv 2411.05007): the names
are shuffled by `random.Random(0)`, the first N taken and sorted, and the noise of a picture is seeded by its name. So
the same N gives the same prompts and noise everywhere. `SETTINGS` has the published steps, guidance and size.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from loraq.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SETTINGS: dict[str, dict[str, Any]] = {
    "PixArtSigmaPipeline": {"num_inference_steps": 20, "guidance_scale": 4.5, "height": 1024, "width": 1024},
    "SanaPipeline": {"num_inference_steps": 20, "guidance_scale": 4.5, "height": 1024, "width": 1024},
    "FluxPipeline": {"num_inference_steps": 50, "guidance_scale": 3.5, "height": 1024, "width": 1024},
}
"""The published arguments of a pipeline's call, by its class, for models that draw 1024 x 1024."""
_PUBLISHED_SIDE = 1024
_MODULUS = 10**9 + 7
_BASE = 31


@attrs.frozen(kw_only=True)
class PromptSet:
    """What is to be drawn: one entry a picture in each; `references` is empty where there are no real pictures."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    references: tuple[Path, ...]


def seed_of(name: str) -> int:
    """The seed of the picture called `name` (no suffix): its characters' polynomial in 31, modulo 1,000,000,007."""
    value = 0
    for character in name:
        value = (value * _BASE + ord(character)) % _MODULUS
    return value


def chosen_names(names: Sequence[str], count: int) -> list[str]:
    """The `count` names that the published rule takes, all where there are no more; sorted."""
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    return sorted(shuffled[:count])


def is_prompt_set(text: str) -> bool:
    """Whether `text` names a data set, as `mjhq:FOLDER` does, rather than a file."""
    kind, colon, folder = text.partition(":")
    return bool(colon and folder) and kind in _READERS


def prompt_set(text: str, count: int, where: str = "--prompts") -> PromptSet:
    """`count` prompts of the data set that `text` names. Raises InputError where it cannot be read or has fewer.

    `where` is where it was named.
    """
    kind, _, folder = text.partition(":")
    if not is_prompt_set(text):
        known = " or ".join(f"{each}:FOLDER" for each in _READERS)
        raise InputError(f"{where} {text}: expected a text file, {known}.")
    found = _READERS[kind](Path(folder))
    if count > len(found):
        raise InputError(f"{where} {text}: {count} prompts are asked for and there are {len(found)}; lower the count.")
    names = chosen_names(list(found), count)
    return PromptSet(
        names=tuple(names),
        prompts=tuple(found[name] for name in names),
        seeds=tuple(seed_of(name) for name in names),
        references=_references(Path(folder), names),
    )


def published_call(model: Path) -> dict[str, Any]:
    """The published arguments for the pipeline in the folder `model`; empty for one that no table of the field has."""
    from loraq.pictures import own_side

    try:
        name = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        if own_side(model) != _PUBLISHED_SIDE:
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(SETTINGS.get(name, {}))


def _mjhq(folder: Path) -> dict[str, str]:
    """Prompts by name: meta_data.json has a table {"category", "prompt"} a name."""
    path = folder / "meta_data.json"
    table = _table(path, json.loads)
    try:
        return {str(name): str(entry["prompt"]) for name, entry in table.items()}
    except (KeyError, TypeError):
        raise InputError(f"{path}: each name must have a 'prompt'; give MJHQ-30K's own meta_data.json.") from None


def _sdci(folder: Path) -> dict[str, str]:
    """Prompts by name: sDCI.yaml has a line `name: prompt` each."""
    import yaml  # comes with huggingface_hub

    path = folder / "sDCI.yaml"
    table = _table(path, yaml.safe_load)
    if not all(isinstance(prompt, str) for prompt in table.values()):
        raise InputError(f"{path}: each name must have a prompt as text; give sDCI's own sDCI.yaml.")
    return {str(name): prompt for name, prompt in table.items()}


_READERS: dict[str, Callable[[Path], dict[str, str]]] = {"mjhq": _mjhq, "sdci": _sdci}


def _table(path: Path, parse: Callable[[str], Any]) -> Mapping[Any, Any]:
    import yaml

    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:  # json's and Unicode's errors are ValueErrors
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the data set's folder.") from None
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{path}: expected a table of prompts by name, got {type(found).__name__}.")
    return found


def _references(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The real picture of each name, found by its stem below `folder`; none where the folder has none of them.

    Raises InputError where some are missing: a comparison with the rest would be another figure.
    """
    by_stem = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURES}
    missing = [name for name in names if name not in by_stem]
    if len(missing) == len(names):
        return ()
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(names)} pictures are missing, '{missing[0]}' first; unpack the data "
            "set's pictures there, or none of them."
        )
    return tuple(by_stem[name] for name in names)
