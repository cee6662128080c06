"""What surrounds the gradient: modes, the frozen teacher, non-finite steps, checkpoints, refusals."""

import copy
import io

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_opd import DistillationModule, estimators
from lit_opd.config import StudentConfig
from lit_opd.errors import UserError
from lit_opd.module import NonFiniteStepError
from lit_opd.types import Estimate, SamplingLaw


@pytest.fixture
def pair(make_model):
    return make_model(1), make_model(2)


# Modes


def test_the_student_that_trains_is_the_one_that_samples(make_model, make_module, fit):
    """Without dropout, whose every call would be another student."""
    student = make_model(1, attention_dropout=0.5).train()
    module = make_module(student, make_model(2), rollout={"max_new_tokens": 8})
    seen = []
    student.model.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), student.training)))
    fit(module, limit_val_batches=1)
    assert set(seen) == {(True, False), (False, False)}
    assert not any(part.training for part in student.modules())


def test_dropout_that_is_kept_is_in_training_alone(make_model, save_model, teacher_path, fit, make_batch, sample):
    """The sampler is the eval-mode law, and the training forward another at every call."""
    config = StudentConfig(save_model(make_model(1, attention_dropout=0.5)), dropout="keep")
    module = DistillationModule(
        config, teacher_path, lint={"allow": ["dropout_in_training"]}, rollout={"max_new_tokens": 8}
    )
    policy = module.student
    assert all(part.training for part in policy.model.modules())
    first = sample(policy.model, make_batch(), SamplingLaw())
    assert torch.equal(first.sampler_logps_BT, sample(policy.model, make_batch(), SamplingLaw()).sampler_logps_BT)
    assert all(part.training for part in policy.model.modules()), "sampling did not restore train mode"
    assert not torch.equal(policy.hidden(first)[0], policy.hidden(first)[0])
    fit(module, limit_val_batches=1)
    assert all(part.training for part in policy.model.modules())


def test_parts_keep_the_mode_they_were_in(make_model, tiny_tokenizer, make_batch, sample):
    student = make_model(1).train()
    student.model.layers[0].eval()
    sample(student, make_batch(), SamplingLaw(), length=2)
    assert student.model.layers[1].training
    assert not student.model.layers[0].training


# The teacher


def test_the_teacher_is_nowhere_but_in_use(pair, make_module, fit):
    student, teacher = pair
    before = copy.deepcopy(teacher.state_dict())
    module = make_module(student, teacher)
    record = fit(module)
    module.train()
    mine = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in mine for p in module.parameters())
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}
    assert len(module.state_dict()) == len(student.state_dict())
    optimizer = module.optimizers().optimizer
    assert not any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
    assert not any(part.training for part in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(g.any() for g in record.gradients[0].values())


def test_a_teacher_that_shares_weights_with_the_student_is_refused(pair, tiny_tokenizer):
    with pytest.raises(UserError, match="of its own"):
        DistillationModule(pair[0], pair[0], tokenizer=tiny_tokenizer)


# A step that is not finite


def test_nothing_moves_where_the_loss_is_not_finite(pair, make_module, fit):
    student, teacher = pair
    calls = []

    def fails_in_the_second_batch(tokens):
        calls.append(1)
        factor = float("nan") if len(calls) > 1 else 1.0
        return Estimate(tokens.student_logps_BT * factor, tokens.student_logps_BT.detach())

    module = make_module(student, teacher, fails_in_the_second_batch)
    after_first = []
    where = r"loss nan.* at optimizer step 1, rollout batch 1 \(first prompt '"
    with pytest.raises(NonFiniteStepError, match=where) as e:
        fit(module, steps=3, callbacks=[Weights(after_first)])
    assert all(torch.equal(after_first[0][name], value) for name, value in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
    assert "optim.lr" in str(e.value)


class Weights(L.Callback):
    def __init__(self, kept):
        self.kept = kept

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.kept.append(copy.deepcopy(pl_module.model.state_dict()))


def test_a_finite_loss_with_an_infinite_gradient_stops_too(pair, make_module, fit):
    def steep(tokens):
        logps = tokens.student_logps_BT
        return Estimate((logps - logps.detach()).abs().sqrt(), logps.detach())

    before = copy.deepcopy(pair[0].state_dict())
    with pytest.raises(NonFiniteStepError, match=r"loss 0\.0, gradient norm"):
        fit(make_module(*pair, steep))
    assert all(torch.equal(before[name], value) for name, value in pair[0].state_dict().items())


@pytest.mark.parametrize("law", [{}, {"temperature": 0.7, "top_k": 5}], ids=["plain", "truncated"])
def test_a_student_whose_logits_are_not_finite_is_told_by_the_step_that_it_wrote(law, pair, make_module, fit):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.global_step == 1:
                pair[0].lm_head.weight.data[3] = torch.nan

    message = r"loss nan.* at optimizer step 1, rollout batch 1 .*Log-probabilities of the student are not finite"
    with pytest.raises(NonFiniteStepError, match=message):
        fit(make_module(*pair, rollout=law), steps=3, callbacks=[Spoil()])


def test_a_teacher_that_overflows_is_named(pair, make_module, fit):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.teacher.model.lm_head.weight.data[3] = torch.nan

    with pytest.raises(NonFiniteStepError, match=r"of the teacher are not finite: .* Or set teacher\.dtype=float32\."):
        fit(make_module(*pair), callbacks=[Spoil()])


# Masked tokens


def test_masked_tokens_are_sampled_and_not_counted(pair, make_module, make_batch):
    module = make_module(*pair, masked_tokens=["7", 5, "<eos>"])
    assert module.masked_ids == [11, 5, 2]
    rollout = module.assemble(verifier=None).sample(make_batch())
    hidden = torch.isin(rollout.ids_BT, torch.tensor([11, 5, 2]))
    assert (hidden & rollout.real_BT).any()
    assert torch.equal(rollout.mask_BT, rollout.real_BT & ~hidden)
    assert rollout.rewards_B is None


@pytest.mark.parametrize("token", ["no such token", 17, -1])
def test_an_unknown_masked_token_is_refused(pair, make_module, token):
    with pytest.raises(UserError, match=r"estimator\.masked_tokens.*single tokens.*Correct it"):
        make_module(*pair, masked_tokens=[token])


# Refusals, before weights load


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"estimator": "token", "rollout": {"temperature": 0}}, r"rollout\.temperature.*above 0 for 'token'"),
        ({"estimator": "mix", "estimator_kwargs": {"terms": {"full_vocab": 1.0, "sequence": 1.0}},
          "rollout": {"temperature": 0}}, r"rollout\.temperature.*above 0 for 'sequence'"),
        ({"aggregation": "mean"}, r"estimator\.aggregation"),
        ({"rollout": {"top_p": 0.0}}, r"rollout\.top_p"),
        ({"evaluation": {"pass_at": [2]}}, r"evaluation\.pass_at"),
        ({"estimator": "teacher_topk", "estimator_kwargs": {"k": 18}}, r"estimator\.kwargs\.k: .*\(17\), found 18"),
        ({"estimator_kwargs": {"divergence": "nearest"}}, r"estimator\.kwargs"),
        ({"optim": {"learning_rate": 1.0}}, r"optim\.learning_rate"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_weights_load(kwargs, key, student_path, teacher_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=key):
        DistillationModule(student_path, teacher_path, **kwargs)


def test_greedy_rollouts_are_fine_for_exact_divergences(pair, make_module, fit):
    record = fit(make_module(*pair, rollout={"temperature": 0, "num_completions": 1}))
    assert not record.rollouts[0].sampler_logps_BT.any()


def test_many_updates_a_rollout_are_not_judged_by_a_batch_size_unknown_here(pair, make_module):
    assert make_module(*pair, optim={"updates_per_rollout": 100}).optim_config.updates_per_rollout == 100


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_fp16_is_refused(pair, make_module, make_trainer, precision):
    module = make_module(*pair)
    module.trainer = type("Trainer", (), {"precision": precision})()
    with pytest.raises(UserError, match="bf16-mixed"):
        module.setup("fit")


def test_an_estimator_that_learns_from_rewards_needs_a_verifier(pair, make_module, fit, make_data):
    @estimators.register_estimator("reinforce", family="sequence", needs="token+rewards")
    def reinforce(tokens):
        return Estimate(-tokens.rewards_B[:, None] * tokens.student_logps_BT, tokens.student_logps_BT.detach())

    data = make_data()
    data.verifier = None
    with pytest.raises(UserError, match=r"data\.verifier.*'reinforce' learns from rewards"):
        fit(make_module(*pair, "reinforce"), data=data)
    assert fit(make_module(*pair, "reinforce")).gradients


# Checkpoints


def checkpoint_of(trainer, path):
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_a_resumed_run_is_the_uninterrupted_one(make_model, save_model, make_module, fit, tmp_path):
    """Bit for bit, with dropout, momentum and a schedule."""
    settings = {"optim": {"name": "AdamW", "lr": 0.01, "warmup_steps": 2, "scheduler": "CosineAnnealingLR",
                          "scheduler_kwargs": {"T_max": 6}}}  # fmt: skip

    student = StudentConfig(save_model(make_model(1, attention_dropout=0.3)), dropout="keep")

    def module():
        return make_module(student, make_model(2), **copy.deepcopy(settings))

    torch.manual_seed(0)
    saving = {
        "enable_checkpointing": True,
        "callbacks": [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    }
    whole = module()
    fit(whole, 4, **saving)
    resumed = module()
    torch.manual_seed(99)
    fit(resumed, 4, ckpt_path=tmp_path / "step=2.ckpt")
    assert all(torch.equal(whole.state_dict()[k], v) for k, v in resumed.state_dict().items())


def test_resuming_after_an_interrupted_step_skips_and_repeats_nothing(pair, make_module, fit, make_trainer, tmp_path):
    """Crash in batch 1; resume, stop at the end of batch 2 with a checkpoint; resume from that."""
    seen = []

    class Crash(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.draws[0][0])
            if len(seen) == 2:
                raise RuntimeError("crash")

        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "crash.ckpt")

    class StopAt(Crash):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if len(seen) == 4:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                raise KeyboardInterrupt

        def on_exception(self, *_):
            pass

    def run(callback, ckpt_path=None):
        module = make_module(*map(copy.deepcopy, pair))
        fit(module, -1, callbacks=[callback], max_epochs=5, ckpt_path=ckpt_path)
        return module.trainer.fit_loop.epoch_loop.batch_progress.total

    with pytest.raises(RuntimeError, match="crash"):
        run(Crash())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(StopAt(), tmp_path / "crash.ckpt")
    total = run(StopAt(), tmp_path / "stop.ckpt")
    assert seen == [0, 1, 1, 2, 3, 4]
    assert {total.ready, total.started, total.processed, total.completed} == {5}


def test_a_checkpoint_does_not_hold_the_teacher_and_fits_in_memory(pair, make_module, fit, make_trainer, make_data):
    module = make_module(*pair)
    trainer = make_trainer()
    trainer.fit(module, make_data())
    file = io.BytesIO()
    torch.save(trainer._checkpoint_connector.dump_checkpoint()["state_dict"], file)
    assert file.tell() < 2 * sum(p.numel() * 4 for p in pair[0].parameters())
