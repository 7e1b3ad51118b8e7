"""ImageReward: how much people would like a picture for its prompt, about -2 to 2.

Xu et al., "ImageReward", NeurIPS 2023 (arXiv 2304.05977). Its package holds on to old versions of other libraries,
which LoRaQ's own cannot share, so it runs in an environment of its own, in a process beside this one:

    python -m venv ir
    ir/bin/pip install image-reward==1.5 clip-anytorch "transformers<4.50" "diffusers<0.33"

and `image_reward.python = "ir/bin/python"`. The process is told a picture's path and prompt, a JSON line each, and
answers with a JSON line. Weights lie in ~/.cache/ImageReward, as the package has them, and the words of BERT in Hugging
Face's cache.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Literal

import attrs

from loraq.contracts import AbstractMetric
from loraq.errors import LoraqError

from .weights import FETCHING, hub_file

if TYPE_CHECKING:
    from PIL import Image

_FILES = ("ImageReward.pt", "med_config.json")
_MODEL = "ImageReward-v1.0"
_WORDS = "bert-base-uncased"
_IMPORT_SECONDS = 180
_SERVER = """
import contextlib, json, sys
out = sys.stdout
with contextlib.redirect_stdout(sys.stderr):
    import ImageReward
    model = ImageReward.load(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]))
print("{}", file=out, flush=True)
for line in sys.stdin:
    path, prompt = json.loads(line)
    with contextlib.redirect_stdout(sys.stderr):
        score = float(model.score(prompt, path))
    print(json.dumps({"score": score}), file=out, flush=True)
"""


@attrs.frozen(kw_only=True)
class ImageReward(AbstractMetric):
    """How much people would like the picture for its prompt; needs image-reward, best in an environment of its own."""

    python: str = ""
    """The Python of the environment that has image-reward; this one unless it is given."""
    folder: str = "~/.cache/ImageReward"
    """Where the weights lie."""
    download: bool = False
    """Whether missing weights may be fetched."""
    device: str = "cpu"
    """Where the model runs: "cpu", "cuda"."""
    paired: ClassVar[bool] = False
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def refusal(self) -> str | None:
        if not self.python and importlib.util.find_spec("ImageReward") is None:
            return (
                "image-reward is not installed; install it in an environment of its own and give its Python as "
                "image_reward.python."
            )
        if self.python and shutil.which(self.python) is None:
            return f"image_reward.python = '{self.python}' is no program; give the Python that has image-reward."
        absent = [name for name in _FILES if not (self._folder / name).is_file()]
        if absent and not self.download:
            return f"{self._folder / absent[0]} is not there: ImageReward's weights; {FETCHING} them."
        if hub_file(_WORDS, "vocab.txt") is None and not self.download:
            return f"{_WORDS}, which ImageReward reads, is not at hand; {FETCHING} it, as does `hf download {_WORDS}`."
        return _import_fault(self.python or sys.executable)

    @property
    def _folder(self) -> Path:
        return Path(self.folder).expanduser()

    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        del original
        server = _started(self.python or sys.executable, self._folder, self.device, self.download)
        with tempfile.TemporaryDirectory(prefix="loraq-") as folder:
            path = Path(folder) / "picture.png"
            picture.save(path)
            return server.ask(path, prompt)


@functools.cache
def _import_fault(python: str) -> str | None:
    """Why that Python cannot import the package: installing it beside newer libraries succeeds, importing does not."""
    try:
        found = subprocess.run(
            [python, "-c", "import ImageReward"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} cannot import ImageReward ({error})."
    if found.returncode == 0:
        return None
    lines = found.stderr.strip().splitlines() or ["no reason given"]
    return (
        f"{python} cannot import ImageReward ({lines[-1]}); give it an environment of its own, by image_reward.python."
    )


@attrs.frozen(eq=False)
class _Server:
    """The process that has the model."""

    process: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, path: Path, prompt: str) -> float:
        """The score of the picture at `path`. Raises LoraqError where the process failed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([str(path), prompt]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it wrote last says why
        return float(self.answer()["score"])

    def answer(self) -> dict[str, float]:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            found: dict[str, float] = json.loads(line)
            return found
        self.process.wait()
        self.errors.seek(0)
        told = self.errors.read().strip().splitlines() or ["it said nothing"]
        raise LoraqError(f"metric 'image_reward': its process ended ({told[-1]}); leave the metric out.")


@functools.cache
def _started(python: str, folder: Path, device: str, download: bool) -> _Server:
    """The process, with the model loaded; it ends with this one, as its input then ends."""
    name = _MODEL if download else str(folder / _FILES[0])
    options = {"device": device, "download_root": str(folder)}
    if not download:
        options["med_config"] = str(folder / _FILES[1])
    offline = {} if download else {"HF_HUB_OFFLINE": "1"}
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # lives with the process
    process = subprocess.Popen(
        [python, "-c", _SERVER, json.dumps([name]), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | offline,
    )
    server = _Server(process, errors)
    server.answer()
    return server
