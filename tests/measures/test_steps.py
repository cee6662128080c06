"""Numbers of a step, against plain loops, numpy and scipy, and gradients whose signal and noise are known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import rollout_from

from lit_opd.measures.steps import gradient_noise, observed_tokens, quantiles, step_report, token_numbers, token_sums
from lit_opd.types import FinishReason, SamplingLaw

values = st.floats(-30, 30, allow_subnormal=False).map(lambda x: round(x, 3))


def make_seen(seed, rows=5, length=8, demonstrations=False):
    """A micro-batch of random numbers: rows of any length, some tokens out of the count."""
    g = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, length + 1, (rows,), generator=g)
    real_BT = torch.arange(length) < lengths_B[:, None]
    mask_BT = real_BT & (torch.rand(rows, length, generator=g) < 0.8)
    sampler_BT = torch.where(real_BT, torch.rand(rows, length, generator=g).log(), 0.0)
    finish_B = torch.randint(0, 2, (rows,), generator=g)
    wrote_B = torch.rand(rows, generator=g) < 0.6 if demonstrations else None
    ids_BT = torch.randint(3, 9, (rows, length), generator=g)
    rollout = rollout_from(
        ids_BT[:, :2], real_BT[:, :2], ids_BT, real_BT, mask_BT, sampler_BT, finish_B, SamplingLaw(),
        torch.arange(rows), wrote_B,
    )  # fmt: skip
    counted = int(mask_BT.sum())
    stats = {name: torch.rand(counted, generator=g).log() for name in ("student_logps", "teacher_logps")}
    stats |= {name: torch.rand(counted, generator=g) for name in ("kl", "student_mass", "teacher_mass")}
    stats["sampler_logps"] = sampler_BT[mask_BT]
    stats["clipped"] = (torch.rand(counted, generator=g) < 0.3).float()
    return rollout, stats


def own_positions(rollout):
    """(row, position, place among the counted) of every counted token that the student wrote."""
    place = 0
    for row in range(len(rollout)):
        for position in range(rollout.mask_BT.shape[1]):
            if not rollout.mask_BT[row, position]:
                continue
            if rollout.student_wrote_BT[row, position]:
                yield row, position, place
            place += 1


@pytest.mark.parametrize("demonstrations", [False, True])
def test_tokens_are_those_that_count_and_that_the_student_wrote(demonstrations):
    seen = [make_seen(seed, demonstrations=demonstrations) for seed in range(3)]
    wanted = []
    for rollout, stats in seen:
        for row, position, n in own_positions(rollout):
            student, teacher = stats["student_logps"][n].item(), stats["teacher_logps"][n].item()
            last = int(rollout.real_BT[row].sum()) - 1
            stops = rollout.finish_B[row] == FinishReason.STOP and position == last
            wanted.append({
                "advantage": teacher - student, "student_nll": -student, "teacher_nll": -teacher,
                "sampler_log_ratio": student - rollout.sampler_logps_BT[row, position].item(),
                "quarter": min(4 * position // 7, 3), "stops": float(stops),
                **{name: stats[name][n].item() for name in ("clipped", "student_mass", "teacher_mass")},
            })  # fmt: skip
    found = observed_tokens(seen, horizon=7)
    assert any(token["stops"] for token in wanted)
    assert found.keys() == wanted[0].keys()
    for name, column in found.items():
        np.testing.assert_allclose(column.numpy(), [token[name] for token in wanted], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("demonstrations", [False, True])
def test_sums_are_over_the_tokens_that_the_student_wrote(demonstrations):
    seen = [make_seen(seed, demonstrations=demonstrations) for seed in range(3)]
    found = token_sums(seen)
    wanted = dict.fromkeys(("own", "kl", "entropy", "gap", "student_mass"), 0.0)
    for rollout, stats in seen:
        for row, position, n in own_positions(rollout):
            student = stats["student_logps"][n].item()
            wanted["own"] += 1
            wanted["kl"] += stats["kl"][n].item()
            wanted["student_mass"] += stats["student_mass"][n].item()
            wanted["entropy"] -= student
            wanted["gap"] += rollout.sampler_logps_BT[row, position].item() - student
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted, rel=1e-5)


@given(st.lists(values, min_size=2, max_size=300), st.integers(0, 2**32))
def test_numbers_are_those_of_numpy_and_scipy(advantages, seed):
    random = np.random.default_rng(seed)
    a = np.array(advantages)
    gap, quarter = random.normal(0, 0.5, len(a)), random.integers(0, 4, len(a))
    stops, clipped, mass = random.random(len(a)) < 0.3, random.random(len(a)) < 0.3, random.random(len(a))
    columns = {
        "advantage": a, "student_nll": mass + 1, "teacher_nll": mass + 2, "sampler_log_ratio": gap, "quarter": quarter,
        "stops": stops, "clipped": clipped, "student_mass": mass, "teacher_mass": mass / 2,
    }  # fmt: skip
    found = token_numbers({name: torch.tensor(column).double() for name, column in columns.items()})
    sizes = np.sort(np.abs(a))[::-1]
    wanted = {
        "advantage/mean": a.mean(), "advantage/std": a.std(), "advantage/min": a.min(), "advantage/max": a.max(),
        **{f"advantage/q{q:02d}": np.quantile(a, q / 100) for q in (1, 5, 25, 50, 75, 95, 99)},
        "advantage/top1_share": sizes[: max(1, len(a) // 100)].sum() / sizes.sum() if sizes.sum() else 0.0,
        "rollout/sampler_ess": np.exp(gap).sum() ** 2 / (len(a) * (np.exp(gap) ** 2).sum()),
        "rollout/sampler_gap_max": np.abs(gap).max(),
        "train/clipped_frac": clipped.mean(), "train/teacher_mass": mass.mean() / 2,
        "train/student_mass_min": mass.min(),
        **({"stop/log_ratio": -a[stops].mean()} if stops.any() else {}),
    }  # fmt: skip
    for name in ("advantage", "student_nll", "teacher_nll", "student_mass"):
        for q in set(quarter):
            wanted[f"train_position/{name}_q{q + 1}"] = columns[name][quarter == q].mean()
    skew = found.pop("advantage/skew")
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    if a.std() > 1e-3:
        assert skew == pytest.approx(scipy.stats.skew(a), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_quantiles_are_torchs(count, dtype):
    values_N = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=dtype)
    shares = (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)
    found = quantiles(values_N, shares)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.quantile(values_N, torch.tensor(shares, dtype=dtype)))


def test_quantiles_of_more_values_than_torch_takes():
    count = 2**24 + 1
    values_N = torch.arange(count, dtype=torch.float32).flip(0)
    assert quantiles(values_N, (0.0, 0.25, 1.0)).tolist() == [0, 2**22, 2**24]


def test_a_step_of_more_tokens_than_torch_takes_has_its_numbers(monkeypatch):
    def refused(*_):
        raise RuntimeError("quantile() input tensor is too large")

    monkeypatch.setattr(torch, "quantile", refused)
    rollout, stats = make_seen(0)
    assert "advantage/q50" in token_numbers(observed_tokens([(rollout, stats)], horizon=8))


def test_nothing_counted_gives_no_numbers():
    rollout, stats = make_seen(0)
    empty = rollout.uncount(rollout.mask_BT), {name: value[:0] for name, value in stats.items()}
    assert token_numbers(observed_tokens([empty], horizon=8)) == {}
    assert token_sums([empty])["own"] == 0


def test_what_an_estimator_has_not_is_left_out():
    rollout, stats = make_seen(0)
    bare = {name: stats[name] for name in ("student_logps", "teacher_logps", "sampler_logps", "kl")}
    names = token_numbers(observed_tokens([(rollout, bare)], horizon=8)).keys()
    assert "advantage/mean" in names
    assert not [name for name in names if "mass" in name or "clipped" in name]


@pytest.mark.parametrize("steps", [2, 5, 60])
def test_signal_and_noise_of_a_gradient_are_told_apart(steps):
    """Many independent coordinates: sums over them are all but certain."""
    size, mean, deviation = 200_000, 0.3, 0.7
    parts = [torch.nn.Parameter(torch.zeros(size)) for _ in range(2)]
    groups = [{"params": [parts[0]], "betas": (0.9, 0.999)}, {"params": [parts[1]], "betas": (0.5, 0.95)}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for part in parts:
            part.grad = mean + deviation * torch.randn(size, generator=g)
        optimizer.step()
    signal, noise = gradient_noise(optimizer)
    assert signal == pytest.approx(2 * size * mean**2, rel=0.02)
    assert noise == pytest.approx(2 * size * deviation**2, rel=0.02)


def test_no_noise_without_moments():
    part = torch.nn.Parameter(torch.ones(3))
    part.grad = torch.ones(3)
    plain, adam = torch.optim.SGD([part], lr=0.1, momentum=0.9), torch.optim.Adam([part], lr=0.1)
    assert gradient_noise(adam) is None, "no step was made"
    for optimizer in (plain, adam):
        optimizer.step()
        assert gradient_noise(optimizer) is None, "one step tells nothing of noise"
    plain.step()
    adam.step()
    assert gradient_noise(plain) is None
    assert gradient_noise(adam) is not None


UPDATE = {"loss": 0.5, "grad_norm": 2.0, "kl": 6.0, "entropy": 3.0, "gap": 0.75, "own": 3.0}
ROLLOUT = {"rows": 2.0, "length": 8.0, "truncated_frac": 1.0, "eos_frac": 1.0, "repetition_frac": 0.5}


def report(**changed):
    both = ({name: changed.get(name, value) for name, value in part.items()} for part in (UPDATE, ROLLOUT))
    return step_report(*both, {"rollout_s": 0.25, "student_s": 0.75}, 12.0)


def test_a_step_is_told_by_the_token_and_by_the_sequence():
    found = report()
    assert "train/student_mass" not in found
    assert step_report(UPDATE | {"student_mass": 1.5}, ROLLOUT, {"step_s": 1.0}, 0.0)["train/student_mass"] == 0.5
    wanted = {"train/loss": 0.5, "train/grad_norm": 2, "train/reverse_kl": 2, "train/entropy": 1, "rollout/length": 4,
              "rollout/sampler_gap": 0.25, "rollout/repetition_frac": 0.25, "rollout/eos_frac": 0.5,
              "perf/tokens_per_s": 8, "perf/rollout_s": 0.25, "perf/step_s": 1, "perf/peak_memory_mb": 12}  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


def test_a_mean_over_nothing_is_not_a_number():
    by_token = {"train/reverse_kl", "train/entropy", "rollout/sampler_gap"}
    by_row = {f"rollout/{name}" for name in ROLLOUT if name != "rows"}
    assert {name for name, value in report(own=0.0).items() if math.isnan(value)} == by_token
    assert {name for name, value in report(rows=0.0).items() if math.isnan(value)} == by_row
