"""Each teacher's share of the gradient, against gradients that autograd takes of dense losses."""

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lit_opd.callbacks import TeacherGradients
from lit_opd.config import Config, TeacherConfig
from lit_opd.measures.ledger import gradient_report
from lit_opd.runs.folder import RunFolder
from lit_opd.runs.lightning_trainer import build_trainer

BOTH = {"a": 0.25, "b": 0.75}
ROUTES = ["a", "b", BOTH, "b", "a"]
ROWS = [{"prompt": p, "t": t} for p, t in zip(["1+2=", "7=", "12-9+3=", "5+5=", "80-1="], ROUTES, strict=True)]
PARTS = ["a", "a and b", "b"]


class Kept(DummyLogger):
    """Keeps what it is given of teachers, by step."""

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        found = {name: value for name, value in metrics.items() if "gradient_" in name}
        if found:
            self.steps[step] = found


@pytest.fixture
def look(make_model, make_module, make_data, fit):
    """Trains with two teachers, and returns the module, the record, and what was logged by step."""

    def run(steps=1, every=1, size=65536, estimator="full_vocab", **kwargs):
        teachers = {"a": make_model(2), "b": make_model(3)}
        module, logger = make_module(make_model(1), None, estimator, teachers=teachers, **kwargs), Kept()
        calls = {"logger": logger, "callbacks": [TeacherGradients(every, size)]}
        record = fit(module, steps, make_data(ROWS, teacher_column="t"), **calls)
        return module, record, logger.steps

    return run


def dense_parts(student, teachers, rollout, full_logits):
    """Gradients [3, P] of the reverse KL to a, to the mixture and to b, of their rows of one step."""
    logps = full_logits(student, rollout).log_softmax(-1)
    taught = [full_logits(teacher, rollout).log_softmax(-1).detach() for teacher in teachers]
    targets = {"a": taught[0], "b": taught[1], "a and b": (0.25 * taught[0].exp() + 0.75 * taught[1].exp()).log()}
    found = []
    for name in PARTS:
        route_M = torch.tensor({"a": [1.0, 0.0], "b": [0.0, 1.0], "a and b": [0.25, 0.75]}[name])
        mask_BT = rollout.mask_BT & (rollout.routes_BM == route_M).all(1)[:, None]
        kl_BT = (logps.exp() * (logps - targets[name])).sum(-1)
        loss = kl_BT[mask_BT].sum() / rollout.mask_BT.sum()
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*student.parameters()], retain_graph=True)])
        )
    return torch.stack(found).double()


def expected_of(parts):
    whole, norms = parts.sum(0), parts.norm(dim=1)
    found = {
        f"teacher/{n}/gradient_share": float(p @ whole / whole.square().sum())
        for n, p in zip(PARTS, parts, strict=True)
    }
    for i, j in ((0, 1), (0, 2), (1, 2)):
        found[f"gradient_cosine/{PARTS[i]}/{PARTS[j]}"] = float(parts[i] @ parts[j] / (norms[i] * norms[j]))
    return found


@pytest.mark.parametrize("budget", [10_000, 30])
def test_shares_and_cosines_are_those_of_the_gradients_of_each_teachers_rows(budget, look, make_model, full_logits):
    """In one micro-batch for each teacher, and in many. The tiny model is not sketched."""
    module, record, steps = look(steps=3, every=2, optim={"micro_batch_tokens": budget})
    assert list(steps) == [2]
    assert (len(module.seen) > 3) == (budget == 30)
    student = make_model(1)
    student.load_state_dict(record.weights[1])
    parts = dense_parts(student, [make_model(2), make_model(3)], record.rollouts[1], full_logits)
    assert steps[2] == pytest.approx(expected_of(parts), rel=1e-4, abs=1e-5)
    assert sum(v for name, v in steps[2].items() if name.endswith("share")) == pytest.approx(1)


def test_a_sketch_is_near_and_looking_changes_nothing(look, make_model, make_module, make_data, fit):
    _, record, exact = look(steps=2)
    _, _, sketched = look(steps=2, size=1024)
    assert sketched[2] != exact[2]
    assert sketched[2] == pytest.approx(exact[2], abs=4 / 1024**0.5)
    teachers = {"a": make_model(2), "b": make_model(3)}
    plain = fit(
        make_module(make_model(1), None, "full_vocab", teachers=teachers), 2, make_data(ROWS, teacher_column="t")
    )
    for name, weight in plain.weights[-1].items():
        assert torch.equal(record.weights[-1][name], weight)


def test_of_several_updates_the_last_is_looked_at(look):
    """Cut in order: it has the rows of one prompt."""
    _, record, steps = look(optim={"updates_per_rollout": 5})
    name = PARTS[{0.0: 2, 0.25: 1, 1.0: 0}[float(record.rollouts[0].routes_BM[-1, 0])]]
    assert steps == {5: {f"teacher/{name}/gradient_share": pytest.approx(1)}}


def test_parts_that_undo_each_other_and_parts_of_nothing():
    taught = torch.tensor([[True, False], [False, True], [True, False]])
    found = gradient_report(torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), taught, "ab")
    assert found == {
        "teacher/b/gradient_share": -0.5, "teacher/a/gradient_share": 1.5, "gradient_cosine/a/b": -1.0,
    }  # fmt: skip
    assert gradient_report(torch.zeros(2, 4), taught[:2], "ab") == {}


def test_only_a_run_with_several_teachers_looks(tmp_path):
    def looks(**keys):
        config = Config(trainer={"accelerator": "cpu", "logger": False}, **keys)
        config.trainer = {"accelerator": "cpu"}
        trainer = build_trainer(config, RunFolder(tmp_path))
        return any(isinstance(callback, TeacherGradients) for callback in trainer.callbacks)

    several = {"teachers": {name: TeacherConfig(path="x") for name in "ab"}}
    assert looks(**several)
    assert not looks()
    config = Config(**several, trainer={"accelerator": "cpu"})
    config.diagnostics.every_n_steps = 0
    assert not any(isinstance(c, TeacherGradients) for c in build_trainer(config, RunFolder(tmp_path)).callbacks)
