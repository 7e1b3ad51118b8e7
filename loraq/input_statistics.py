"""What calibration knows of a layer's input, for the strategies that ask for it by class.

    Gram            the mean of x xᵀ: what an error in the weight does to the output
    ChannelMaxima   the largest magnitude of each channel
    ChannelMeans    the mean magnitude of each channel
    TokenSample     some tokens themselves, drawn evenly from all that passed

A statistic is a frozen attrs class whose fields are tensors, so that any of them can be kept in a safetensors file. It
grows by `observed`, and two of them, of different prompts, add up by `merged`: several processes may each do a part.
What passed through a pre-transform is another input: `transformed` gives the statistic of that. A Gram matrix is turned
exactly; magnitudes do not survive a rotation and are taken anew from the sample.

A third party's statistic is a subclass of `AbstractStatistic` (loraq/contracts.py) that its strategy names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

import attrs

from loraq.contracts import AbstractStatistic
from loraq.errors import LoraqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

Transform = Callable[["Tensor"], "Tensor"]
"""x̃ (tokens, inn) from x (tokens, inn)."""


@attrs.frozen(eq=False)
class Gram(AbstractStatistic):
    """The Gram matrix of the input: `sums` (inn, inn) float32 of x xᵀ over `count` () float64 tokens."""

    needs_sample: ClassVar[bool] = False

    sums: Tensor
    count: Tensor

    @classmethod
    def empty(cls, inn: int, device: torch.device | str, *, sample: int) -> Self:
        del sample
        sums = torch.zeros(inn, inn, dtype=torch.float32, device=device)
        return cls(sums, torch.zeros((), dtype=torch.float64, device=device))

    @classmethod
    def bytes(cls, inn: int, *, sample: int) -> int:
        del sample
        return 4 * inn * inn + 8

    def observed(self, tokens: Tensor, generator: torch.Generator) -> Self:
        del generator
        return type(self)(self.sums.addmm_(tokens.T, tokens), self.count + len(tokens))

    def merged(self, other: Self) -> Self:
        return type(self)(self.sums + other.sums, self.count + other.count)

    def transformed(self, transform: Transform, sample: Tensor) -> Self:
        del sample
        return type(self)(transform(transform(self.sums).T.contiguous()), self.count)

    @property
    def mean(self) -> Tensor:
        """E[x xᵀ], (inn, inn) float32; zeros where no token was seen."""
        return self.sums / self.count.clamp(min=1).float()


@attrs.frozen(eq=False)
class ChannelMaxima(AbstractStatistic):
    """`values` (inn,) float32: the largest magnitude of each channel."""

    needs_sample: ClassVar[bool] = True

    values: Tensor

    @classmethod
    def empty(cls, inn: int, device: torch.device | str, *, sample: int) -> Self:
        del sample
        return cls(torch.zeros(inn, dtype=torch.float32, device=device))

    @classmethod
    def bytes(cls, inn: int, *, sample: int) -> int:
        del sample
        return 4 * inn

    def observed(self, tokens: Tensor, generator: torch.Generator) -> Self:
        del generator
        return type(self)(torch.maximum(self.values, tokens.abs().amax(dim=0))) if len(tokens) else self

    def merged(self, other: Self) -> Self:
        return type(self)(torch.maximum(self.values, other.values))

    def transformed(self, transform: Transform, sample: Tensor) -> Self:
        return type(self)(transform(sample).abs().amax(dim=0)) if len(sample) else self


@attrs.frozen(eq=False)
class ChannelMeans(AbstractStatistic):
    """The mean magnitude of each channel: `sums` (inn,) float64 of |x| over `count` () float64 tokens."""

    needs_sample: ClassVar[bool] = True

    sums: Tensor
    count: Tensor

    @classmethod
    def empty(cls, inn: int, device: torch.device | str, *, sample: int) -> Self:
        del sample
        zeros = torch.zeros(inn, dtype=torch.float64, device=device)
        return cls(zeros, torch.zeros((), dtype=torch.float64, device=device))

    @classmethod
    def bytes(cls, inn: int, *, sample: int) -> int:
        del sample
        return 8 * inn + 8

    def observed(self, tokens: Tensor, generator: torch.Generator) -> Self:
        del generator
        return type(self)(self.sums + tokens.abs().sum(dim=0, dtype=torch.float64), self.count + len(tokens))

    def merged(self, other: Self) -> Self:
        return type(self)(self.sums + other.sums, self.count + other.count)

    def transformed(self, transform: Transform, sample: Tensor) -> Self:
        if not len(sample):
            return self
        means = transform(sample).abs().mean(dim=0, dtype=torch.float64)
        return type(self)(means * self.count, self.count)

    @property
    def mean(self) -> Tensor:
        """E[|x|], (inn,) float32."""
        return (self.sums / self.count.clamp(min=1)).float()


@attrs.frozen(eq=False)
class TokenSample(AbstractStatistic):
    """`tokens` (kept, inn) float32 of at most `size` () int64, each with its `keys` (kept,) float64.

    Every token draws a random key and the largest keys are kept: an even sample of all tokens, whatever the number of
    calls, and of two samples merged as well.
    """

    needs_sample: ClassVar[bool] = False

    tokens: Tensor
    keys: Tensor
    size: Tensor

    @classmethod
    def empty(cls, inn: int, device: torch.device | str, *, sample: int) -> Self:
        keys = torch.zeros(0, dtype=torch.float64, device=device)
        return cls(torch.zeros(0, inn, dtype=torch.float32, device=device), keys, torch.tensor(sample, device=device))

    @classmethod
    def bytes(cls, inn: int, *, sample: int) -> int:
        return sample * (4 * inn + 8) + 8

    def observed(self, tokens: Tensor, generator: torch.Generator) -> Self:
        keys = torch.rand(len(tokens), dtype=torch.float64, generator=generator, device=generator.device)
        return self.merged(self._largest(tokens, keys.to(tokens.device)))

    def merged(self, other: Self) -> Self:
        return self._largest(torch.cat([self.tokens, other.tokens]), torch.cat([self.keys, other.keys]))

    def _largest(self, tokens: Tensor, keys: Tensor) -> Self:
        """The sample of these tokens alone: those of the largest keys, largest first."""
        kept = torch.topk(keys, min(len(keys), int(self.size)), sorted=True).indices
        return type(self)(tokens[kept], keys[kept], self.size)

    def transformed(self, transform: Transform, sample: Tensor) -> Self:
        del sample
        return type(self)(transform(self.tokens), self.keys, self.size)


Statistic = TypeVar("Statistic", bound=AbstractStatistic)


@attrs.frozen(eq=False)
class InputStatistics:
    """All that is known of one layer's input, by class: `statistics[Gram].mean`."""

    found: Mapping[type[AbstractStatistic], AbstractStatistic] = attrs.field(factory=dict)

    def get(self, kind: type[Statistic]) -> Statistic | None:
        """The statistic of this class, None where it was not collected."""
        found = self.found.get(kind)
        return found if isinstance(found, kind) else None

    def __getitem__(self, kind: type[Statistic]) -> Statistic:
        """The statistic of this class. Raises LoraqError where nobody asked for it."""
        found = self.get(kind)
        if found is None:
            raise LoraqError(
                f"{kind.__name__} was not collected: a strategy that reads it names it in its `statistics` property, "
                "and the recipe needs [calibration]."
            )
        return found

    def to(self, device: torch.device | str) -> InputStatistics:
        """The statistics on `device`."""
        return InputStatistics({kind: _moved(statistic, device) for kind, statistic in self.found.items()})

    def transformed(self, transform: Transform) -> InputStatistics:
        """The statistics of x̃ = transform(x), a linear map of each token."""
        sample = self.get(TokenSample)
        tokens = None if sample is None else sample.tokens
        moved: dict[type[AbstractStatistic], AbstractStatistic] = {}
        for kind, statistic in self.found.items():
            if kind.needs_sample and tokens is None:
                raise LoraqError(
                    f"{kind.__name__} of a transformed input needs a TokenSample, which was not collected."
                )
            moved[kind] = statistic.transformed(transform, torch.zeros(0, 0) if tokens is None else tokens)
        return InputStatistics(moved)


def _moved(statistic: AbstractStatistic, device: torch.device | str) -> AbstractStatistic:
    fields: tuple[attrs.Attribute[Tensor], ...] = attrs.fields(type(statistic))  # type: ignore[arg-type]  # attrs classes
    return type(statistic)(**{field.name: getattr(statistic, field.name).to(device) for field in fields})


NOTHING = InputStatistics()
"""What is known without calibration."""
