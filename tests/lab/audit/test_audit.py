"""`python -m lit_opd audit` on the shipped pair, and on pairs that something is wrong with."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_opd.cli import main
from lit_opd.config import PACKAGE_FOLDER, TeacherConfig, load_config
from lit_opd.errors import UserError
from lit_opd.lab.audit import CHECKS, Finding, audit
from lit_opd.lab.audit.auditing import Audit, _of_one
from lit_opd.lab.audit.evidence import gather
from lit_opd.runs.prepare import prepare_data

QUICKSTART = Path(__file__).parents[3] / "conf" / "quickstart.yaml"
TINY = PACKAGE_FOLDER / "tiny"


def configured(*words):
    return load_config([QUICKSTART], ["data.train_size=96", "data.validation_size=2", *words])


def command(capsys, *words):
    code = main(["audit", "--config", str(QUICKSTART), "data.train_size=96", "data.validation_size=2", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def permuted(tmp_path):
    """A copy of the teacher in whose vocabulary two digits have changed places."""
    folder = tmp_path / "permuted"
    shutil.copytree(TINY / "teacher", folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(tokenizer))
    return folder


def test_the_shipped_pair_passes_in_every_item_under_a_minute(capsys, tmp_path):
    pytest.importorskip("bitsandbytes")
    code, out, err = command(capsys, "--json", str(tmp_path / "audit.json"))
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "audit.json").read_text())
    verdicts = {finding["item"]: finding["verdict"] for finding in written["findings"]}
    assert set(verdicts.values()) == {"pass"}
    assert len(verdicts) == len(CHECKS) + 2
    assert written["verdict"] == "pass"
    assert written["seconds"] < 60
    assert (written["probe"]["prompts"], written["probe"]["completions"]) == (64, 64)
    assert written["tokens"] == sorted(written["tokens"], key=lambda row: -row["mean"])
    assert sum(row["count"] for row in written["tokens"]) == written["probe"]["tokens"]
    assert f"{len(verdicts)} pass, 0 warn, 0 fail" in out
    assert all(item in out for item in verdicts)
    assert "Ids by mean log-ratio" in out


def test_a_permuted_vocabulary_fails_before_weights_load(capsys, permuted, monkeypatch, tmp_path):
    monkeypatch.setattr("lit_opd.lab.audit.auditing.gather", lambda config: pytest.fail("weights were read"))
    code, out, err = command(capsys, f"teacher.path={permuted}", "--json", str(tmp_path / "audit.json"))
    assert code == 1
    assert err == "failed: the audit: 1 of 2 items fail (vocabulary).\n"
    assert "id 5 is '1' for the student and '2' for the teacher; 2 of 17 ids differ" in " ".join(out.split())
    assert "-> Choose a teacher and a student of one tokenizer family." in out
    written = json.loads((tmp_path / "audit.json").read_text())
    assert (written["verdict"], written["tokens"], written["probe"]) == ("fail", [], {})


def test_a_destination_that_cannot_be_written_is_told_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("lit_opd.lab.audit.audit", lambda config: pytest.fail("it began"))
    (tmp_path / "taken").touch()
    for path, expected in (
        (tmp_path / "taken" / "audit.json", "a folder that can be written to"),
        (tmp_path, "a file"),
        (Path("/proc/audit.json"), "a folder that can be written to"),  # which the root of Linux may write to, it says
    ):
        for experiment in ("audit", "measure"):
            assert main([experiment, "--config", str(QUICKSTART), "--json", str(path)]) == 2
            assert capsys.readouterr().err.startswith(f"error: --json: expected {expected}, found ")


def test_what_fit_refuses_is_refused(capsys):
    code, _, err = command(capsys, "estimator.name=token", "rollout.top_p=0.9")
    assert code == 2
    assert err.startswith("error: rollout.top_p: expected 1 for 'token'")


def test_numbers_that_are_none_are_null_in_json(tmp_path):
    from lit_opd.lab.audit import write_json

    nan = float("nan")
    write_json(Audit({"item": Finding("warn", "é", "fix", {"a": nan, "b": 1.0})}, [], {}, nan), tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["findings"] == [{"item": "item", "verdict": "warn", "found": "é", "fix": "fix",
                                    "numbers": {"a": None, "b": 1.0}}]  # fmt: skip
    assert written["seconds"] is None


def test_the_student_is_looked_at_as_training_would_begin(tmp_path):
    evidence = gather(configured("estimator.masked_tokens=[';']", "seed=3"))
    again = gather(configured("estimator.masked_tokens=[';']", "seed=3"))
    assert torch.equal(evidence.rollout.ids_BT, again.rollout.ids_BT)
    semicolon = evidence.student.tokenizer.convert_tokens_to_ids(";")
    ids, rollout = evidence.rollout.ids_BT, evidence.rollout
    assert torch.equal(rollout.mask_BT, rollout.real_BT & (ids != semicolon))
    other = gather(configured("seed=4"))
    assert not torch.equal(other.rollout.prompts.ids_BP, rollout.prompts.ids_BP)


def test_a_small_training_batch_is_enlarged_and_a_small_data_set_is_taken_whole():
    assert len(gather(configured("data.batch_size=2", "rollout.num_completions=4")).rollout) == 64
    assert len(gather(configured("data.batch_size=96")).rollout) == 96
    assert len(gather(configured("data.train_size=5", "data.batch_size=2")).rollout) == 5


@pytest.mark.parametrize(("precision", "estimator"), [("bf16-mixed", "token"), ("bf16-true", "full_vocab")])
def test_other_precisions_run_through(precision, estimator):
    found = audit(configured(f"trainer.precision={precision}", f"estimator.name={estimator}"))
    verdicts = {item: finding.verdict for item, finding in found.findings.items()}
    assert verdicts["null test"] == verdicts["sign test"] == "pass"


@pytest.mark.parametrize("estimator", ["outcome", "exopd"])
def test_rewards_groups_and_references_are_there_for_who_asks(estimator):
    words = ("rollout.num_completions=4", "data.batch_size=16", "data.train_size=16")
    found = audit(configured(f"estimator.name={estimator}", *words))
    assert {item: finding.verdict for item, finding in found.findings.items()}["null test"] == "pass"


def test_each_of_several_teachers_is_audited_alone_with_the_prompts_that_are_its_own(tmp_path, monkeypatch):
    """One item that depends on the teacher stands for all of them, and one that needs no weights."""
    file = tmp_path / "routes.py"
    file.write_text("def route(row):\n    return 'a' if len(row['answer']) > 2 else {'a': 0.5, 'b': 0.5}\n")
    monkeypatch.setattr("lit_opd.lab.audit.auditing.CHECKS", {"student prefixes": CHECKS["student prefixes"]})
    config = configured("data.batch_size=2", "data.train_size=24", "rollout.max_new_tokens=12")
    prompts = prepare_data(config, tell=False).train_prompts
    rows = prompts.rows
    both = [number for number, row in enumerate(rows) if len(row["answer"]) <= 2]
    assert 0 < len(both) < len(rows)
    sure = replace(config.teacher, temperature=0.5)
    several = replace(
        config, teacher=TeacherConfig(), teachers={"a": config.teacher, "b": sure},
        data=replace(config.data, teacher_column=f"{file}:route"),
    )  # fmt: skip
    found = audit(several)
    alone = {"a": audit(config), "b": _of_one(replace(config, teacher=sure), both)}
    assert found.findings == {
        f"{name}: {item}": finding for name, one in alone.items() for item, finding in one.findings.items()
    }
    assert found.findings["a: student prefixes"] != found.findings["b: student prefixes"]
    assert found.probe["prompts"] == sum(one.probe["prompts"] for one in alone.values())
    read = gather(replace(config, teacher=sure), both).rollout.prompts
    spelt = [ids_P[mask_P].tolist() for ids_P, mask_P in zip(read.ids_BP, read.mask_BP, strict=True)]
    assert sorted(spelt) == sorted(prompts.ids[number] for number in both)
    (tmp_path / "others.py").write_text("def route(row):\n    return 'b'\n")
    none = replace(several, data=replace(several.data, teacher_column=f"{tmp_path}/others.py:route"))
    with pytest.raises(UserError, match=r"data\.teacher_column: expected training prompts .* found none for a"):
        audit(none)
