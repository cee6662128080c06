"""The pair whose teacher spells a tag in other pieces and ends with another token: found, and mended as proposed."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from warm import in_turn

from lit_opd.cli import main
from lit_opd.config import load_config
from lit_opd.lab.audit import audit

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "conf" / "quickstart.yaml"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from tools import make_mismatched_pair

        yield make_mismatched_pair


@pytest.fixture(scope="module")
def pair(tool, of_all_workers):
    """Both models; training takes seconds, so that all workers have one pair."""
    out, threads = of_all_workers / "mismatched_pair", torch.get_num_threads()
    with in_turn(of_all_workers / "mismatched_pair.turn"):
        if not (out / "student_both_ends").exists():
            torch.set_num_threads(1)
            tool.make_pair(out, steps=60)
            torch.set_num_threads(threads)
    return out


def words(pair, student="student", *more):
    return ["data.train_size=96", "data.validation_size=2", "rollout.max_new_tokens=24",
            f"student.path={pair / student}", f"teacher.path={pair / 'teacher'}", *more]  # fmt: skip


@cache
def found(pair, *more):
    result = audit(load_config([QUICKSTART], words(pair, *more)))
    return result.findings, result.tokens


def test_each_role_has_its_spelling_and_its_end_over_one_vocabulary(tool):
    student, teacher = (tool.build_tokenizer(role) for role in ("student", "teacher"))
    assert student.get_vocab() == teacher.get_vocab()
    texts = [tokenizer.convert_ids_to_tokens(tokenizer("<think>1+2=3<eos>", add_special_tokens=False)["input_ids"])
             for tokenizer in (student, teacher)]  # fmt: skip
    assert texts == [["<", "think>", *"1+2=3", "<eos>"], ["<think", ">", *"1+2=3", "<eos>"]]
    assert [tokenizer.eos_token for tokenizer in (student, teacher)] == ["<eos>", "<end>"]
    for tokenizer in (student, teacher):
        ids = tokenizer("<think>7<end><eos>", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>7"


def test_the_teacher_never_learns_to_write_the_students_pieces(tool):
    inputs, labels = tool.examples("teacher")
    tokenizer = tool.build_tokenizer("teacher")
    own, other = (
        [tokenizer.convert_tokens_to_ids(piece) for piece in tool.PIECES[role]] for role in ("teacher", "student")
    )
    assert not torch.isin(labels, torch.tensor(other)).any()
    assert int(torch.isin(inputs, torch.tensor(other)).sum()) == int(torch.isin(inputs, torch.tensor(own)).sum()) > 0
    assert (labels[torch.isin(inputs, torch.tensor(other))] == tool.IGNORED).all()


def test_the_mismatch_is_found_and_named(pair):
    items, tokens = found(pair)
    assert items["vocabulary"].verdict == "pass", "the vocabularies are one: no check of ids can find it"
    assert items["segmentation"].verdict == "warn"
    assert "'<' 'think>' by the student's, '<think' '>' by the teacher's" in items["segmentation"].found
    assert items["stop tokens"].found == "'<eos>' for the student, '<end>' for the teacher"
    assert items["teacher at ends"].verdict == "fail"
    assert "as [2, 21]. Or let it keep its own: estimator.merged_stops=auto" in items["teacher at ends"].fix
    ranked = {row.token: row for row in tokens if row.huge}
    assert {"'<'", "'<eos>'"} <= ranked.keys() <= {"'<'", "'think>'", "'<eos>'"}
    assert (ranked["'<'"].expected, ranked["'<eos>'"].expected) == ("'<think'", "'<end>'")
    fix = items["log-ratio by id"].fix
    assert items["log-ratio by id"].verdict == "warn"
    assert fix.index("as [2, 21]") < fix.index("stop-gap") < fix.index("estimator.masked_tokens=[17")


def test_endings_that_the_loss_merges_are_not_blamed(pair):
    """Both models' numbers are then those of symbols, while the sampler's are still those of single tokens."""
    items, tokens = found(pair, "student", "estimator.merged_stops=auto")
    assert "merges endings" in items["stop tokens"].found
    passed = ("stop tokens", "teacher at ends", "null test", "sampler gap")
    assert {items[item].verdict for item in passed} == {"pass"}
    assert {row.token for row in tokens if row.huge} <= {"'<'", "'think>'"}


def test_the_command_fails_and_says_where(pair, capsys, tmp_path):
    assert main(["audit", "--config", str(QUICKSTART), *words(pair), "--json", str(tmp_path / "a.json")]) == 1
    assert "(teacher at ends)" in capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text())["verdict"] == "fail"


def test_with_the_proposals_taken_up_neither_ends_nor_ids_are_blamed(pair):
    _, tokens = found(pair)
    mask = [row.id for row in tokens if row.huge and not row.stops]
    items, _ = found(pair, "student_both_ends", f"estimator.masked_tokens={mask}")
    assert items["stop tokens"].verdict == items["teacher at ends"].verdict == "pass"
    assert items["log-ratio by id"].verdict == "pass"
    assert items["log-ratio by id"].found.endswith("left out already: " + ", ".join(
        row.token for row in sorted(tokens, key=lambda row: row.id) if row.huge and not row.stops))  # fmt: skip
