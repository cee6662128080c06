"""Cutting rollouts, and the streams of random numbers."""

import itertools

import numpy as np
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import rollout_from

from lit_opd.rollout import micro_batches, split_updates, uniforms
from lit_opd.types import SamplingLaw

fast = settings(max_examples=60, deadline=None)
lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=20)


def rollout_of(sizes, prompts=None):
    """A rollout with prompts and completions of the given lengths; by default each row has a prompt of its own."""
    widths, completions = torch.tensor(sizes).T
    prompt_mask = torch.arange(widths.max()).flip(0) < widths[:, None]
    mask = torch.arange(completions.max()) < completions[:, None]
    return rollout_from(prompt_mask.long(), prompt_mask, mask.long(), mask, mask, mask.float(), torch.zeros(len(sizes)),
                   SamplingLaw(), torch.arange(len(sizes)) if prompts is None else torch.tensor(prompts))  # fmt: skip


@fast
@given(lengths, st.integers(1, 120), st.randoms(use_true_random=False))
def test_micro_batches_hold_every_row_once_sorted_and_within_the_budget(sizes, budget, random):
    chosen = torch.tensor(random.sample(range(len(sizes)), random.randint(1, len(sizes))))
    rollout = rollout_of(sizes)
    groups = micro_batches(rollout, chosen, budget)
    rows = [row for group in groups for row in group.tolist()]
    assert sorted(rows) == sorted(chosen.tolist())
    totals = [sum(sizes[row]) for row in rows]
    assert totals == sorted(totals)
    for group in groups:
        part = rollout.rows(group)
        assert torch.cat([part.prompts.ids_BP, part.ids_BT], 1).numel() <= budget or len(group) == 1


@fast
@given(lengths, st.integers(1, 120))
def test_micro_batches_are_as_few_as_this_order_allows(sizes, budget):
    """A new one is begun only where the next row did not fit."""
    groups = [group.tolist() for group in micro_batches(rollout_of(sizes), torch.arange(len(sizes)), budget)]
    for group, following in itertools.pairwise(groups):
        rows = [*group, following[0]]
        assert (max(sizes[r][0] for r in rows) + max(sizes[r][1] for r in rows)) * len(rows) > budget


@fast
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 12), st.integers(1, 4))
def test_updates_split_the_rows_evenly_and_alike_on_any_number_of_processes(prompts, completions, updates, processes):
    places = list(range(prompts))
    whole = split_updates(places, completions, updates, prompts)
    assert len(whole) == updates
    assert sorted(row for part in whole for row in part.tolist()) == list(range(prompts * completions))
    assert max(map(len, whole)) - min(map(len, whole)) <= 1
    for rank in range(min(processes, prompts)):
        own = list(range(prompts))[rank::processes]
        parts = split_updates([places[p] for p in own], completions, updates, prompts)
        for part, expected in zip(parts, whole, strict=True):
            numbers = [own[row // completions] * completions + row % completions for row in part.tolist()]
            assert set(numbers) == {row for row in expected.tolist() if row // completions in own}


@st.composite
def prompts_with_completions(draw):
    """Lengths and prompts of some rows: the completions of a prompt are neighbours, and share its length."""
    groups = draw(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=4)),
                           min_size=1, max_size=8))  # fmt: skip
    rows = [((width, length), prompt) for prompt, (width, lengths) in enumerate(groups) for length in lengths]
    return [size for size, _ in rows], [prompt for _, prompt in rows]


def tokens_of(rollout, rows):
    part = rollout.rows(torch.as_tensor(rows))
    return torch.cat([part.prompts.ids_BP, part.ids_BT], 1).numel()


@fast
@given(prompts_with_completions(), st.integers(1, 150), st.randoms(use_true_random=False))
def test_whole_prompts_stay_in_one_micro_batch(scene, budget, random):
    """Every chosen row once; a micro-batch beyond the budget is one prompt, which cannot be cut."""
    sizes, prompts = scene
    rollout, chosen = rollout_of(sizes, prompts), random.sample(range(len(sizes)), random.randint(1, len(sizes)))
    groups = [group.tolist() for group in micro_batches(rollout, torch.tensor(chosen), budget, whole_prompts=True)]
    assert sorted(row for group in groups for row in group) == sorted(chosen)
    owners = [{prompts[row] for row in group} for group in groups]
    assert sum(map(len, owners)) == len({prompts[row] for row in chosen}), "a prompt is in two micro-batches"
    for group, owner in zip(groups, owners, strict=True):
        assert tokens_of(rollout, group) <= budget or len(owner) == 1


@fast
@given(prompts_with_completions(), st.integers(1, 150))
def test_micro_batches_of_whole_prompts_are_as_few_as_their_order_allows(scene, budget):
    """Prompts come by their longest row; a micro-batch is begun only where the next prompt did not fit."""
    sizes, prompts = scene
    rollout = rollout_of(sizes, prompts)
    groups = [group.tolist() for group in micro_batches(rollout, torch.arange(len(sizes)), budget, whole_prompts=True)]
    order = list(dict.fromkeys(prompts[row] for group in groups for row in group))
    longest = [
        max(sum(size) for size, owner in zip(sizes, prompts, strict=True) if owner == prompt) for prompt in order
    ]
    assert longest == sorted(longest)
    for group, following in itertools.pairwise(groups):
        first = [row for row in following if prompts[row] == prompts[following[0]]]
        assert tokens_of(rollout, [*group, *first]) > budget


@fast
@given(lengths, st.integers(1, 120))
def test_where_every_prompt_has_one_completion_whole_prompts_change_nothing(sizes, budget):
    rollout, rows = rollout_of(sizes), torch.arange(len(sizes))
    cuts = [micro_batches(rollout, rows, budget, whole_prompts=whole) for whole in (False, True)]
    assert [group.tolist() for group in cuts[0]] == [group.tolist() for group in cuts[1]]


@fast
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 12), st.integers(1, 4))
def test_whole_prompts_stay_in_one_update(prompts, completions, updates, processes):
    """Evenly, and alike on any number of processes; no update is empty where there is a prompt for each."""
    places = list(range(prompts))
    whole = [part.tolist() for part in split_updates(places, completions, updates, prompts, whole_prompts=True)]
    owners = [[row // completions for row in part] for part in whole]
    assert [prompt for part in owners for prompt in part] == [p for p in range(prompts) for _ in range(completions)]
    assert sum(len(set(part)) for part in owners) == prompts
    counts = [len(set(part)) for part in owners]
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 0 or updates > prompts
    for rank in range(min(processes, prompts)):
        own = list(range(prompts))[rank::processes]
        parts = split_updates([places[p] for p in own], completions, updates, prompts, whole_prompts=True)
        for part, expected in zip(parts, owners, strict=True):
            assert [own[row // completions] for row in part.tolist()] == [p for p in expected if p in own]


def test_streams_are_distinct_uniform_and_independent_of_the_batch():
    draws = [(number, place) for number in range(8) for place in range(8)]
    numbers = uniforms((3, 0), draws, 2, 50)
    assert numbers.shape == (128, 50)
    assert numbers.dtype == torch.float64
    assert len({tuple(row) for row in numbers.tolist()}) == 128
    assert scipy.stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    correlations = np.corrcoef(numbers.numpy())[np.triu_indices(128, 1)]
    assert abs(correlations).max() < 0.65
    for place in (0, 13, 63):
        assert torch.equal(uniforms((3, 0), draws[place : place + 1], 2, 50), numbers[2 * place : 2 * place + 2])
    assert torch.equal(uniforms((3, 0), draws, 2, 20), numbers[:, :20]), "a longer stream begins with the shorter one"
    assert torch.equal(uniforms((3, 0), draws[:1], 1, 50), numbers[:1])
    for seed in ((4, 0), (3, 1)):
        assert not torch.isin(uniforms(seed, draws, 2, 50), numbers).any()
