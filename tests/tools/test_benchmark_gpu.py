"""The benchmark of an accelerator runs from end to end on tiny sizes, and tells what failed."""

import importlib
import itertools
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    from tools.benchmark import gpu

    return gpu


@pytest.mark.slow
def test_every_case_has_its_table(gpu, monkeypatch, tmp_path, capsys):
    import tools.benchmark.__main__ as cli
    from tools.benchmark.card.sizes import TINY

    ticks = itertools.count(1)

    def seconds(run, device, **how):
        """Let every time be a second more than the last: no verdict may hang on those of tiny models."""
        run()
        return float(next(ticks))

    monkeypatch.setattr("tools.benchmark.card.decode.seconds", seconds)
    monkeypatch.setattr(gpu, "has_trl", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda module, job: importlib.import_module(module).measure(job))
    cli.main(["gpu", "--tiny", "--quick", "--out", str(tmp_path)])
    text, found = (tmp_path / "benchmark_gpu.md").read_text(), json.loads((tmp_path / "benchmark_gpu.json").read_text())
    assert "failed" not in text
    assert [len(found[name]["rows"]) for name in ("decode", "head", "long")] == [2, 2, 2]
    assert [row["ms"] for row in found["decode"]["rows"]] == [pytest.approx(1e3 / (TINY.new - TINY.new // 4))] * 2
    assert found["checks"]["repeated"]
    assert max(found["checks"]["fp32_off"].values()) == 0  # one device is compared with itself
    assert found["checks"]["decoded"]["alike"] == 1
    assert "lit_opd" in text


def test_a_case_that_fails_is_told_in_its_table(gpu):
    failed = {"failed": "CUDA error: out of memory"}
    results = {
        "device": "a card", "machine": gpu.report.machine(), "g1": [{"side": "lit_opd", "round": 1, **failed}],
        "decode": failed, "head": failed, "long": failed, "checks": failed,
    }  # fmt: skip
    assert gpu.to_text(results).count("CUDA error: out of memory") == 5


def test_without_an_accelerator_it_says_so(gpu, monkeypatch, capsys):
    import torch

    import tools.benchmark.__main__ as cli

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["gpu"])
    assert "expected an accelerator, found none; --tiny" in capsys.readouterr().err


def test_the_limit_of_decoding_is_reading_weights_and_cache_once(gpu):
    from tools.benchmark.card.decode import limit_seconds
    from tools.benchmark.card.sizes import Shape

    # One layer of width 2: attention 4 products of 2 x 2, MLP 3 of 2 x 3, so 34 weights, and a head of 5 x 2.
    # Two rows of 7 columns hold 2 x 2 numbers each. All are 2 bytes, and 4 bytes a second are read.
    found = limit_seconds(Shape(2, 3, 1, 1, 1, 2), vocabulary=5, rows=2, context=7, read=4.0)
    assert found == pytest.approx((2 * 44 + 2 * 7 * 4 * 2) / 4)


def test_ratios_need_all_their_numbers(gpu):
    row = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert gpu.ratio(row, "a", "b", "c") == {"ratio": 1.0}
    assert gpu.ratio(row | {"c": None}, "a", "b", "c") == {}
