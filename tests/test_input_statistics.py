"""Statistics of a layer's input: those of all tokens, however they came, and of the transformed input."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraq.contracts import AbstractStatistic
from loraq.errors import LoraqError
from loraq.input_statistics import ChannelMaxima, ChannelMeans, Gram, InputStatistics, TokenSample
from loraq.pipeline import layer_generator
from matrices import seeded

KINDS = (Gram, ChannelMaxima, ChannelMeans, TokenSample)
kinds = st.sampled_from(KINDS)


@st.composite
def prompts(draw: st.DrawFn) -> list[list[Tensor]]:
    """Some prompts, each some calls of a layer, each some tokens (tokens, inn), an empty call now and then."""
    inn = draw(st.integers(1, 9))
    counts = draw(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=5))
    scale = 2.0 ** draw(st.integers(-20, 20))
    seed = draw(st.integers(0, 2**31))
    return [
        [seeded(count, inn, seed=seed + 10 * place + step, scale=scale) for step, count in enumerate(calls)]
        for place, calls in enumerate(counts)
    ]


def collected(
    kind: type[AbstractStatistic], lot: Sequence[tuple[int, list[Tensor]]], inn: int, size: int
) -> AbstractStatistic:
    """The statistic of some prompts, each with the generator that is its own."""
    found = kind.empty(inn, "cpu", sample=size)
    for place, calls in lot:
        generator = layer_generator(0, str(place))
        for tokens in calls:
            found = found.observed(tokens.clone(), generator)
    return found


def tensors(statistic: AbstractStatistic) -> dict[str, Tensor]:
    return {field.name: getattr(statistic, field.name) for field in attrs.fields(type(statistic))}


def same(first: AbstractStatistic, second: AbstractStatistic, *, exactly: bool) -> bool:
    """Whether two statistics are equal, sums of float32 to their rounding."""
    pairs = [(value, tensors(second)[name]) for name, value in tensors(first).items()]
    if exactly:
        return all(torch.equal(one, other) for one, other in pairs)
    return all(
        one.shape == other.shape
        and bool((one.double() - other.double()).abs().max() <= 1e-5 * one.double().abs().max())
        for one, other in pairs
        if one.numel()
    )


@given(prompts())
def test_statistics_are_those_of_all_tokens_at_once(prompts: list[list[Tensor]]) -> None:
    tokens = torch.cat([each for calls in prompts for each in calls]).double()
    count, inn = tokens.shape
    lot = list(enumerate(prompts))
    gram = collected(Gram, lot, inn, 4)
    assert isinstance(gram, Gram)
    assert float(gram.count) == count
    norm = float(tokens.square().sum())
    assert (gram.mean.double() * count - tokens.T @ tokens).abs().max() <= 1e-6 * norm
    maxima = collected(ChannelMaxima, lot, inn, 4)
    assert isinstance(maxima, ChannelMaxima)
    assert torch.equal(maxima.values.double(), tokens.abs().amax(dim=0) if count else torch.zeros(inn).double())
    means = collected(ChannelMeans, lot, inn, 4)
    assert isinstance(means, ChannelMeans)
    assert torch.allclose(means.mean.double() * count, tokens.abs().sum(dim=0), rtol=1e-6, atol=0)


@given(prompts(), kinds, st.data())
def test_parts_add_up_to_the_whole_however_they_are_cut(
    prompts: list[list[Tensor]], kind: type[AbstractStatistic], data: st.DataObject
) -> None:
    inn, size = prompts[0][0].shape[1], data.draw(st.integers(1, 12))
    lot = list(enumerate(prompts))
    whole = collected(kind, lot, inn, size)
    owner = data.draw(st.lists(st.integers(0, 2), min_size=len(lot), max_size=len(lot)))
    parts = [
        collected(kind, [each for each, who in zip(lot, owner, strict=True) if who == one], inn, size)
        for one in range(3)
    ]
    first, second, third = data.draw(st.permutations(parts))
    # Samples and maxima are picked, not added: equal to the bit whatever the cut, sums to their rounding.
    exactly = kind in (ChannelMaxima, TokenSample)
    assert same(first.merged(second).merged(third), whole, exactly=exactly), "added up"
    assert same(first.merged(second.merged(third)), whole, exactly=exactly), "associative"
    assert same(first.merged(second), second.merged(first), exactly=True), "commutative"


@given(prompts(), st.integers(1, 20))
def test_a_sample_is_of_the_tokens_that_passed_and_as_large_as_it_may_be(
    prompts: list[list[Tensor]], size: int
) -> None:
    tokens = torch.cat([each for calls in prompts for each in calls])
    found = collected(TokenSample, list(enumerate(prompts)), tokens.shape[1], size)
    assert isinstance(found, TokenSample)
    assert len(found.tokens) == len(found.keys) == min(size, len(tokens))
    assert torch.equal(found.keys, found.keys.sort(descending=True).values)
    left = [row.tolist() for row in tokens]
    for row in found.tokens.tolist():
        left.remove(row)  # each token is taken once


def test_a_sample_is_even_over_calls() -> None:
    """A token of the first call is as likely to be kept as one of the last, larger one."""
    chosen = torch.zeros(40)
    calls = [torch.arange(4.0)[:, None], torch.arange(4.0, 10)[:, None], torch.arange(10.0, 40)[:, None]]
    for seed in range(500):
        found = TokenSample.empty(1, "cpu", sample=8)
        generator = layer_generator(seed, "even")
        for tokens in calls:
            found = found.observed(tokens, generator)
        chosen[found.tokens.flatten().long()] += 1
    expected, deviation = 500 * 8 / 40, (500 * 0.2 * 0.8) ** 0.5
    assert (chosen - expected).abs().max() < 4.5 * deviation
    assert abs(float(chosen[:4].mean()) - expected) < 4.5 * deviation / 2


@given(prompts(), st.integers(0, 2**31))
def test_statistics_of_the_transformed_input(prompts: list[list[Tensor]], seed: int) -> None:
    """With a sample that holds all tokens, transforming the statistics is taking those of the transformed tokens."""
    inn = prompts[0][0].shape[1]
    matrix = seeded(inn, inn, seed=seed)
    lot = list(enumerate(prompts))
    before = InputStatistics({kind: collected(kind, lot, inn, 1000) for kind in KINDS})
    after = before.transformed(lambda tokens: tokens @ matrix.T)
    moved = [(place, [tokens @ matrix.T for tokens in calls]) for place, calls in lot]
    expected = {kind: collected(kind, moved, inn, 1000) for kind in KINDS}
    scale = max([1e-30, *(float(tokens.abs().max()) for calls in prompts for tokens in calls if len(tokens))])
    for kind in KINDS:
        for name, value in tensors(expected[kind]).items():
            tolerance = 1e-4 * (scale * (1 + float(matrix.abs().sum()))) ** (2 if kind is Gram else 1)
            count = sum(len(tokens) for calls in prompts for tokens in calls)
            difference = (tensors(after[kind])[name].double() - value.double()).abs()
            assert float(difference.max() if value.numel() else 0) <= tolerance * max(1, count), (kind, name)


@given(kinds, st.integers(1, 20), st.integers(1, 9))
def test_bytes_are_foretold(kind: type[AbstractStatistic], inn: int, size: int) -> None:
    found = collected(kind, [(0, [seeded(size + 3, inn)])], inn, size)
    assert sum(tensor.nbytes for tensor in tensors(found).values()) == kind.bytes(inn, sample=size)


def test_what_was_not_collected_is_missed_in_a_sentence() -> None:
    found = InputStatistics({ChannelMaxima: collected(ChannelMaxima, [(0, [seeded(3, 4)])], 4, 2)})
    assert found.get(Gram) is None
    with pytest.raises(LoraqError, match=r"Gram was not collected: .* needs \[calibration\]"):
        found[Gram]
    with pytest.raises(LoraqError, match="ChannelMaxima of a transformed input needs a TokenSample"):
        found.transformed(lambda tokens: tokens)


def test_statistics_move_between_devices() -> None:
    found = InputStatistics({kind: collected(kind, [(0, [seeded(3, 4)])], 4, 2) for kind in KINDS})
    for kind, statistic in found.to("meta").found.items():
        assert type(statistic) is kind
        assert all(tensor.is_meta for tensor in tensors(statistic).values())
    assert all(same(found.to("cpu")[kind], found[kind], exactly=True) for kind in KINDS)
