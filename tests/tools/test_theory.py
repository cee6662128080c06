import itertools
import json
import math
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, second_moment

FOLDER = Path(__file__).parents[2] / "tools" / "theory"
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def theory():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import control
        import growth
        import markov
        import policy
        import run
        import summary

        yield types.SimpleNamespace(
            control=control, growth=growth, markov=markov, policy=policy, run=run, summary=summary
        )


@pytest.fixture
def comparison(theory):
    """Two gammas by two seeds, with teachers that are not trained."""
    settings = theory.control.Settings(gammas=(0.5, 1.0), seeds=(42, 43), horizon=5, batch=16, iterations=4)
    generators = settings.generators(theory.control.TEACHERS, 2)
    return theory.control.Comparison(settings, theory.policy.initial(generators))


@pytest.fixture
def students(theory):
    return theory.policy.initial([torch.Generator().manual_seed(number) for number in range(4)])


def as_module(parameters, index):
    """One of the networks, built from torch's own layers."""
    layers = []
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        layer = torch.nn.Linear(*weight.shape[1:]).double()
        layer.weight.data, layer.bias.data = weight[index].T.double().clone(), bias[index, 0].double().clone()
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def normal_of(module, features):
    mean, raw = module(features.double()).unbind(-1)
    return Normal(mean, 0.1 + softplus(raw))


def test_student_has_about_4k_parameters(students):
    assert sum(tensor[0].numel() for tensor in students) == 4022


def test_rollout_moves_by_the_policys_mean_and_std_from_start_on(theory, students):
    task = theory.policy.TASKS[1]
    noise = torch.randn(4, 3, 6)
    found = theory.policy.roll_out(students, [task] * 4, noise)
    for n, b in itertools.product(range(4), range(3)):
        module, position = as_module(students, n), -2.0
        for t in range(6):
            law = normal_of(module, torch.tensor([1.0, position, t / 6]))
            position += (law.mean + law.stddev * noise[n, b, t]).item()
        assert float(found.ends_NB[n, b]) == pytest.approx(position, abs=1e-4)


def test_training_gradient_is_that_of_separate_networks_by_double_loops(theory, comparison, students):
    task = theory.policy.TASKS[0]
    noise = torch.randn(4, 16, 5)
    trajectories = theory.policy.roll_out(students, [task] * 4, noise)
    students = [tensor.requires_grad_() for tensor in students]
    teachers = comparison.teachers_of(task)
    logps, ratios = theory.control.log_ratios(students, teachers, trajectories)
    credit = theory.control.credits_of(ratios, comparison.settings.gammas)
    (credit * logps).sum(2).mean(1).sum().backward()
    micro = theory.control.output_gradients(students, trajectories, credit)
    for n, gamma in enumerate((0.5, 0.5, 1.0, 1.0)):
        student, teacher = as_module(students, n), as_module(comparison.teachers, [0, 2, 0, 2][n])
        loss = 0.0
        for b in range(16):
            logp = normal_of(student, trajectories.features_NBTF[n, b]).log_prob(trajectories.moves_NBT[n, b].double())
            teacher_logp = normal_of(teacher, trajectories.features_NBTF[n, b]).log_prob(trajectories.moves_NBT[n, b])
            ratio = (logp - teacher_logp).tolist()
            for t in range(5):
                loss = loss + sum(gamma ** (i - t) * ratio[i] for i in range(t, 5)) * logp[t] / 16
        loss.backward()
        close = {"rtol": 1e-3, "atol": 1e-3 * float(student[4].weight.grad.abs().max())}
        torch.testing.assert_close(students[0].grad[n].double(), student[0].weight.grad.T, **close)
        torch.testing.assert_close(students[4].grad[n].double(), student[4].weight.grad.T, **close)
        probed = micro[n].mean(0).double()
        torch.testing.assert_close(probed[:, :-1], student[4].weight.grad, **close)
        torch.testing.assert_close(probed[:, -1], student[4].bias.grad, **close)


def test_at_gamma_1_the_gradient_is_in_the_mean_that_of_the_sequence_kl(theory, students):
    """The pathwise gradient, through the moves themselves, knows neither scores nor returns."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 40_000, 6, generator=generator)
    one, teacher = ([tensor[:1].clone() for tensor in students] for _ in range(2))
    teacher[4] *= 4  # the log-ratio depends on the position, so that it matters where a move leads
    trajectories = theory.policy.roll_out(one, [theory.policy.TASKS[0]], noise)
    _, ratios = theory.control.log_ratios(one, teacher, trajectories)
    found = {}
    for gamma in (0.0, 1.0):
        credit = theory.control.credits_of(ratios, (gamma,))
        found[gamma] = theory.control.output_gradients(one, trajectories, credit)[0].mean(0)

    student, fixed = as_module(one, 0), as_module(teacher, 0)
    position, total = torch.full((40_000,), 2.0, dtype=torch.float64), 0.0
    for t in range(6):
        features = torch.stack([torch.full_like(position, -1.0), position, torch.full_like(position, t / 6)], dim=-1)
        law = normal_of(student, features)
        move = law.mean + law.stddev * noise[0, :, t]
        total = total + law.log_prob(move) - normal_of(fixed, features).log_prob(move)
        position = position + move
    total.mean().backward()
    wanted = torch.cat([student[4].weight.grad, student[4].bias.grad[:, None]], dim=1)
    assert float((found[1.0] - wanted).norm() / wanted.norm()) < 0.05
    assert float((found[0.0] - wanted).norm() / wanted.norm()) > 0.2


def test_variance_probe_by_hand(theory):
    gradients = torch.tensor([[[[1.0, 2.0]], [[3.0, 6.0]]], [[[0.0, 0.0]], [[0.0, 2.0]]]])
    assert theory.control.micro_batch_variance(gradients).tolist() == [5.0, 1.0]


def test_micro_batches_are_disjoint_groups_of_trajectories(theory, comparison, students):
    trajectories = theory.policy.roll_out(students, [theory.policy.TASKS[0]] * 4, torch.randn(4, 16, 5))
    credit = torch.zeros(4, 16, 5)
    credit[:, 2:4] = 1.0
    norms = theory.control.output_gradients(students, trajectories, credit).flatten(2).norm(dim=2)
    assert (norms > 0).tolist() == [[False, True] + [False] * 6] * 4


def test_runs_of_a_seed_share_teachers_start_and_noise(theory, comparison):
    marked = replace(comparison, teachers=[torch.arange(4.0).view(4, 1, 1)])
    left, right = (marked.teachers_of(task)[0].flatten().tolist() for task in theory.policy.TASKS)
    assert (left, right) == ([0, 2, 0, 2], [1, 3, 1, 3])
    _, probes = comparison.distil()
    first = probes[0]["distance"]
    assert first[0] == pytest.approx(first[1])
    assert first[0][0] != pytest.approx(first[0][1])


def test_a_run_does_not_depend_on_which_others_run_beside_it(theory, comparison):
    together, _ = comparison.distil()
    alone, _ = replace(comparison, settings=replace(comparison.settings, gammas=(1.0,))).distil()
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[2:], one, rtol=1e-4, atol=1e-5)


def test_probe_at_the_same_student_differs_in_gamma_only(theory, comparison):
    _, probes = comparison.distil()
    for probe in probes:
        assert probe["variance"][0] == probe["variance_same_student"][0]
    assert probes[0]["variance"][1] == pytest.approx(probes[0]["variance_same_student"][1])
    assert probes[-1]["variance"][1] != pytest.approx(probes[-1]["variance_same_student"][1])


def test_reinforce_and_distillation_learn(theory):
    settings = theory.control.Settings(
        gammas=(0.0,), seeds=(42,), horizon=4, iterations=300, teacher_iterations=300, learning_rate=3e-3,
        teacher_learning_rate=3e-3, fresh=500,
    )  # fmt: skip
    untrained = theory.summary.teacher_distance(
        settings, theory.control.train_teachers(replace(settings, teacher_iterations=0))
    )
    teachers = theory.control.train_teachers(settings)
    found, _ = theory.summary.compare(settings, teachers)
    assert max(found["teacher_distance"]) < 0.5 < min(untrained)
    assert max(end["distance"] for end in found["ends"]) < 0.5 < found["probes"][0]["distance"][0][0]


def test_gaussian_kl_is_torchs(theory, comparison, students):
    task = theory.policy.TASKS[0]
    trajectories = theory.policy.roll_out(students, [task] * 4, torch.randn(4, 3, 5))
    teachers = comparison.teachers_of(task)
    found = theory.summary.gaussian_kl(students, teachers, trajectories)
    for n in range(4):
        laws = [normal_of(as_module(nets, n), trajectories.features_NBTF[n]) for nets in (students, teachers)]
        torch.testing.assert_close(found[n].double(), kl_divergence(*laws), rtol=1e-3, atol=1e-3)


def test_a_target_is_reached_only_with_the_whole_interval(theory):
    ends = [{"gamma": 0.0, "high": 0.5}, {"gamma": 0.0, "high": 0.51}, {"gamma": 1.0, "high": 9.0}]
    assert theory.summary.reached(ends, (0.0, 1.0)) == {"0": "1 of 2", "1": "0 of 1"}


def test_variance_ratios_are_geometric_means_over_probes(theory):
    probes = [{"variance": [[1.0, 2.0], [10.0, 2.0]]}, {"variance": [[4.0, 1.0], [4.0, 9.0]]}]
    found = theory.summary.variance_ratios(probes, "variance")
    assert found[0] == [1.0, 1.0]
    assert found[1] == pytest.approx([math.sqrt(10.0), 3.0])


def brute_force(laws, gamma, shared):
    """Enumeration of all completions, with a loop over every pair of positions."""
    size = laws[0].scores_VG.shape[1]
    total = 0.0
    for tokens in itertools.product(range(len(laws[0].probs_V)), repeat=len(laws)):
        gradient, prob = torch.zeros(1 if shared else len(laws), size, dtype=torch.float64), 1.0
        for t, (law, token) in enumerate(zip(laws, tokens, strict=True)):
            prob *= float(law.probs_V[token])
            for i in range(t, len(laws)):
                ratio = laws[i].log_ratio_V[tokens[i]]
                gradient[0 if shared else t] += gamma ** (i - t) * ratio * law.scores_VG[token]
        total += prob * float(gradient.square().sum())
    return total


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("shared", [True, False])
def test_second_moments_are_those_of_enumeration(theory, gamma, shared):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    laws = [theory.growth.token_law(s, q, sampler.softmax(-1)) for s, q, sampler in logits.unbind(1)]
    found = theory.growth.second_moments(laws, gamma, shared)
    assert found == pytest.approx([brute_force(laws[:length], gamma, shared) for length in range(1, 6)], rel=1e-10)


@pytest.mark.parametrize(("name", "gamma"), [("token", 0.0), ("hybrid", 0.5), ("sequence", 1.0)])
def test_second_moments_are_the_oracles_of_the_registered_estimators(theory, name, gamma):
    case = theory.growth.random_tables(seed=5, length=3)
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    tables = [torch.cat([table[t].expand(8**t, 8) for t in range(3)]) for table in (student, teacher)]
    wanted = second_moment(
        TabularPair(*tables, horizon=3), build(name, **({"gamma": gamma} if name == "hybrid" else {}))
    )
    assert theory.growth.second_moments(case.laws, gamma, shared=False)[-1] == pytest.approx(wanted, rel=1e-10)


@pytest.fixture(scope="module")
def growth_found(theory):
    return theory.growth.measure()


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        ("worst_completion", 2, 4),
        ("teacher_samples", 2, 4),
        ("student_samples", 2, 3),
        ("random", 1, 3),
        ("near", 1, 2),
    ],
)
def test_slopes_at_gamma_0_and_1(growth_found, case, low, high):
    rows = growth_found["cases"][case]["rows"]
    first, last = (sum(row["slopes"]) / len(row["slopes"]) for row in (rows[0], rows[-1]))
    assert first == pytest.approx(low, abs=0.15)
    assert last == pytest.approx(high, abs=0.15)


def test_worst_completion_meets_the_bounds_with_equality(theory, growth_found):
    for row in growth_found["cases"]["worst_completion"]["rows"]:
        bounds = [theory.growth.completion_bound(length, row["gamma"]) for length in growth_found["lengths"]]
        assert row["moments"][0] == pytest.approx(bounds, rel=1e-10)
    assert theory.growth.completion_bound(7, 0.0) == 7**2
    assert theory.growth.completion_bound(7, 1.0) == (7 * 8 / 2) ** 2


@pytest.mark.parametrize("case", ["student_samples", "random", "near"])
def test_where_the_student_draws_the_tokens_its_own_bound_holds(theory, growth_found, case):
    for row in growth_found["cases"][case]["rows"]:
        bounds = [theory.growth.on_policy_bound(length, row["gamma"]) for length in growth_found["lengths"]]
        assert all(value <= bound for curve in row["moments"] for value, bound in zip(curve, bounds, strict=True))


def test_on_policy_bound_is_of_third_order_and_fails_off_policy(theory, growth_found):
    bounds = [theory.growth.on_policy_bound(length, 1.0) for length in growth_found["lengths"]]
    assert theory.growth.slope(growth_found["lengths"][-2:], bounds[-2:]) == pytest.approx(3, abs=0.02)
    assert theory.growth.on_policy_bound(2, 0.5) == pytest.approx((1 + math.sqrt(1.25)) ** 2)
    assert growth_found["cases"]["teacher_samples"]["rows"][-1]["moments"][0][-1] > 50 * bounds[-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_on_policy_bound_holds_where_tokens_depend_on_their_prefix(theory, seed, scale):
    """By the oracle's enumeration: whatever the student, scores of different positions are uncorrelated."""
    pair = TabularPair.random(2, 6, seed, scale)
    logps, teacher_logps = pair.student_logits_CV.log_softmax(-1), pair.teacher_logits_CV.log_softmax(-1)
    unit = float((logps - teacher_logps).abs().max() * (torch.eye(2) - logps.exp()[:, None]).norm(dim=-1).max()) ** 2
    for name, gamma in (("token", 0.0), ("sequence", 1.0)):
        assert second_moment(pair, build(name)) <= unit * theory.growth.on_policy_bound(6, gamma)


def test_slope_of_a_power_law(theory):
    assert theory.growth.slope([1, 2, 4, 8], [5.0 * length**2.5 for length in (1, 2, 4, 8)]) == pytest.approx(2.5)


def test_json_is_read_back_with_four_digits(theory):
    value = {"a": [1.23456, 7], "b": {"c": list(range(100))}, "d": "x", "e": None, "f": 1e-9, "g": True}
    text = theory.run.to_json(value)
    assert json.loads(text) == {**value, "a": [1.235, 7]}
    assert max(map(len, text.splitlines())) <= 160


def test_quick_run_writes_its_files(theory, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        theory.run.main(["--quick", "--out", str(tmp_path / "docs")])
    finally:
        torch.set_num_threads(threads)
    names = ["theory.json", "theory_control.png", "theory_growth.png", "theory_map.png"]
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == names
    found = json.loads((tmp_path / "docs" / "theory.json").read_text())
    assert set(found) == {"control", "growth", "map"}
    assert set(found["control"]) == {"main", "learning_rate", "horizon", "large_batch", "warm_start"}
    assert len(found["control"]["main"]["ends"]) == 8
    assert all((tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG") for name in names[1:])
    assert "wrote theory.json" in capsys.readouterr().out
