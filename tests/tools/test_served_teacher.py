import re
from pathlib import Path

from lit_opd.teachers import ServedScorer

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "conf" / "quickstart.yaml")


def test_it_times_both_ways_with_every_number_of_requests(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from tools import served_teacher

    monkeypatch.setattr(served_teacher, "IN_FLIGHT", (2,))
    ahead = ServedScorer.ahead
    words = ["data.train_size=8", "data.validation_size=2", "data.batch_size=4", "rollout.max_new_tokens=4"]
    served_teacher.main(["--config", QUICKSTART, "--stand-in", "0.01", "--rounds", "1", *words])
    *_, line = capsys.readouterr().out.splitlines()
    sampled, scored, both = map(float, re.fullmatch(r"\| 2 \| \d+ \| (\S+) \+ (\S+) = (\S+) \| \S+ \|", line).groups())
    assert abs(sampled + scored - both) < 0.02
    assert scored >= 2 * 0.01
    assert ServedScorer.ahead is ahead
