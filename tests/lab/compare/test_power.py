"""What so many seeds can tell, against the simulated test itself."""

from types import SimpleNamespace

import numpy as np
import pytest

from lit_opd.cli import main
from lit_opd.lab.compare.power import power_of, smallest_difference
from lit_opd.lab.compare.simultaneous import critical, range_tail


def test_the_chance_is_that_of_the_tests_first_step():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20000, 4, 3)) + np.array([3.0, 0, 0, 0])[:, None]
    rest = x - x.mean(2, keepdims=True) - x.mean(1, keepdims=True) + x.mean((1, 2), keepdims=True)
    error = np.sqrt((rest**2).sum((1, 2)) / 6 * 2 / 3)
    told = (x[:, 0].mean(1) - x[:, 1].mean(1)) / error > critical(range_tail, 4, 6.0)
    assert power_of(3.0, 4, 3) == pytest.approx(told.mean(), abs=0.01)


def test_the_smallest_difference_is_where_the_chance_is_met():
    sight = smallest_difference(5, 3)
    assert power_of(sight.half, 5, 3) == pytest.approx(0.5)
    assert power_of(sight.nine_in_ten, 5, 3) == pytest.approx(0.9)
    assert smallest_difference(5, 1).half == float("inf")
    assert power_of(9.0, 5, 1) == 0.0


def test_a_plan_says_it_before_anything_runs(write_comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here = SimpleNamespace(folder=tmp_path, uri="sqlite:///mlflow.db")
    file = write_comparison(here, variants=["token", "full_vocab", "jsd"], seeds=[0, 1, 2])
    assert main(["compare", "--plan", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "3 variants x 3 seeds: 9 runs" in out
    (line,) = [line for line in out.splitlines() if "<- these" in line]
    assert line.split()[:3] == ["3", "2.69", "4.41"]
    assert [path.name for path in tmp_path.iterdir()] == ["compare.yaml"]
