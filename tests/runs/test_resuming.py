"""What may change at a resume: a table that says it of every key, and runs that are held to it."""

from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
import torch

from lit_opd.cli import main
from lit_opd.config import Config, load_config, to_yaml
from lit_opd.errors import UserError
from lit_opd.optim import build_optimizer, build_scheduler
from lit_opd.runs import train
from lit_opd.runs.resuming import AT_A_RESUME, check_changes

SHORT = ("trainer.max_steps=4", "evaluation.every_n_steps=2", "evaluation.teacher=false", "rollout.max_new_tokens=4",
         "data.validation_size=2", "optim.warmup_steps=2", "tracking.system_metrics=false")  # fmt: skip


def keys(schema=Config, prefix=""):
    hints = get_type_hints(schema)
    for own in fields(schema):
        section = is_dataclass(hints[own.name])
        yield from keys(hints[own.name], f"{own.name}.") if section else [f"{prefix}{own.name}"]


def test_every_key_of_the_table_exists_and_takes_one_side():
    sides = [key for side in AT_A_RESUME.values() for key in side]
    assert len(sides) == len(set(sides))
    assert {key for key in sides if not key.startswith("trainer.")} < set(keys())


def test_other_values_are_refused_told_or_taken(workspace, capsys):
    run, words = workspace, workspace.arguments("fit", *SHORT)
    train(load_config([words[2]], [*words[3:], "trainer.max_steps=2"]))
    refused = ("optim.name=SGD", "optim.kwargs={momentum: 0.9}", "seed=1")
    assert main(run.arguments("fit", *SHORT, "--resume", "auto", *refused)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: seed, optim.name, optim.kwargs: expected 0, 'AdamW', {")
    assert "found 1, 'SGD', {'momentum': 0.9}." in line
    assert "python -m lit_opd export" in line

    over = (
        "optim.scheduler=OneCycleLR",
        "optim.scheduler_kwargs={max_lr: 1e-3, total_steps: 1}",
        "optim.warmup_steps=0",
    )
    assert main(run.arguments("fit", *SHORT, "--resume", "auto", *over)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: optim.scheduler_kwargs: expected a schedule that reaches step 2,")

    changed = ("optim.lr=3e-4", "optim.scheduler=LinearLR", "optim.scheduler_kwargs.total_iters=9",
               "optim.warmup_steps=0", "rollout.temperature=0.9", "diagnostics.every_n_steps=3")  # fmt: skip
    words = run.arguments("fit", *SHORT, "--resume", "auto", *changed)
    assert main(words) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "the resumed run changes" in line]
    for part in ("optim.lr from 0.001 to 0.0003", "optim.scheduler from 'CosineAnnealingLR' to 'LinearLR'",
                 "optim.warmup_steps from 2 to 0", "rollout.temperature from 1.0 to 0.9"):  # fmt: skip
        assert part in told
    assert "diagnostics" not in told
    assert "optim.clip_norm" not in told  # of which nothing was changed
    assert "max_steps" not in told
    config = load_config([run.output / "config.yaml"])
    assert (config.optim.lr, config.optim.scheduler) == (3e-4, "LinearLR")
    state = torch.load(run.checkpoint, weights_only=True)
    optimizer = build_optimizer(config.optim, [torch.nn.Parameter(torch.zeros(1, 1))])
    scheduler = build_scheduler(config.optim, optimizer)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]
    assert state["lr_schedulers"] == [scheduler.state_dict()]
    (record,) = run.runs
    logged = {m.step: m.value for m in run.client.get_metric_history(record.info.run_id, "lr-AdamW")}
    assert [logged[2], logged[3]] == pytest.approx(rates[2:])


def test_paths_that_lead_to_the_same_place_and_keys_that_were_not_there_are_no_change(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    monkeypatch.chdir(tmp_path)
    given = ["student.path=model", "teacher.path=other"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([], given)).replace("  top_p: 1.0\n", ""))
    check_changes(load_config([], [f"student.path={tmp_path}/model", "teacher.path=./other", "rollout.top_p=0.5"]),
                  checkpoint, own=True)  # fmt: skip
    with pytest.raises(UserError, match=r"teacher\.path: expected 'other', as the run has it .* found 'third'\."):
        check_changes(load_config([], ["student.path=model", "teacher.path=third"]), checkpoint, own=True)
    with pytest.raises(UserError, match=r"tracking\.experiment: expected 'lit_opd'"):
        check_changes(load_config([], [*given, "tracking.experiment=e"]), checkpoint, own=True)
    check_changes(load_config([], [*given, "tracking.experiment=e"]), checkpoint, own=False)
