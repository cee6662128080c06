"""A student that is its own teacher: against a copy of it in memory that reads the same prompts."""

import copy

import peft
import pytest
import torch

from lit_opd import PromptDataModule
from lit_opd.config import TeacherConfig
from lit_opd.errors import UserError

HINT = "1+1=2;{prompt}".replace(";", "-")
HERE = {"follow_rate": 0.25, "follow_every": 2}


def section(follow="initial", **keys):
    return TeacherConfig(kind="student", **({"follow": follow, "prompt": HINT} | HERE | keys))


@pytest.fixture
def data(make_data):
    return lambda: make_data(shown={"teacher": {"prompt_template": HINT}})


def gradients(module, fit, data, steps=3):
    return fit(module, steps, data=data).gradients


def check_same(found, expected, bound=1e-6):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for key, gradient in other.items():
            assert float((one[key] - gradient).norm()) <= bound * float(gradient.norm()) + 1e-9, key


@pytest.mark.parametrize("name", ["token", "teacher_topk", "full_vocab"])
def test_the_student_before_training_teaches_as_a_copy_of_it_does(name, make_model, make_module, fit, data):
    own = gradients(make_module(make_model(1), section(), name), fit, data())
    copied = make_module(make_model(1), make_model(1), name)
    check_same(own, gradients(copied, fit, data()))
    assert any(float(g.norm()) > 1e-3 for g in own[0].values())  # the hint moves the teacher


class Copied:
    """What the teacher's weights are to be before each step, computed from the recorded weights of the student."""

    def __init__(self, follow, weights):
        self.follow, self.weights = follow, weights

    def at(self, step):
        if self.follow == "initial":
            return self.weights[0]
        if self.follow == "live":
            return self.weights[step]
        if self.follow == "every":
            return self.weights[step // 2 * 2]
        average = self.weights[0]
        for later in self.weights[1 : step + 1]:
            average = {n: 0.75 * w + 0.25 * later[n] for n, w in average.items()}
        return average


def named(model, recorded):
    """Recorded weights or gradients by the names that they have in the model itself."""
    return {name: recorded[name] for name, _ in model.named_parameters()}


@pytest.mark.parametrize("follow", ["initial", "live", "every", "ema"])
def test_the_teacher_follows_the_student(follow, make_model, make_module, fit, data):
    record = fit(make_module(make_model(1), section(follow)), 5, data=data())
    expected = Copied(follow, record.weights)
    for step in range(1, 5):
        student, teacher = make_model(1), make_model(1)
        student.load_state_dict(named(student, record.weights[step]))
        teacher.load_state_dict(named(teacher, expected.at(step)))
        found = one_gradient(make_module(student, teacher), record.rollouts[step])
        for key, gradient in named(student, record.gradients[step]).items():
            assert float((found[key] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-7, key


def one_gradient(module, rollout):
    distiller = module.assemble(None)
    (micro,) = distiller.score(rollout)
    tokens = rollout.mask_BT.sum()
    weights = distiller.weights(micro.rollout.mask_BT, tokens, torch.tensor(len(rollout)))
    distiller.estimate(micro, weights).value.backward()
    return {name: weight.grad for name, weight in module.model.named_parameters()}


def test_without_its_adapters_a_student_is_what_it_began_as(make_model, make_module, fit, data):
    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(make_model(1), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))

    found = [gradients(make_module(adapted(), section(f)), fit, data()) for f in ("adapter_off", "initial")]
    check_same(*found)
    with pytest.raises(UserError, match=r"teacher\.follow: expected a student with adapters"):
        make_module(make_model(1), section("adapter_off"))


@pytest.mark.parametrize("follow", ["ema", "initial"])
def test_a_resumed_run_goes_on_with_the_same_teacher(
    follow, make_model, make_module, fit, data, tmp_path, make_trainer
):
    whole = fit(make_module(make_model(1), section(follow)), 4, data=data())
    trainer = make_trainer(2)
    trainer.fit(make_module(make_model(1), section(follow)), data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(make_module(make_model(1), section(follow)), 4, data=data(), ckpt_path=tmp_path / "half.ckpt")
    for key, weight in whole.weights[-1].items():
        assert torch.equal(weight, rest.weights[-1][key]), key


def test_the_students_weights_are_its_own_again_after_scoring(make_model, make_module, make_batch):
    module = make_module(make_model(1), section())
    distiller = module.assemble(None)
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.mul_(1.5)
    before = copy.deepcopy(module.model.state_dict())
    places = [p.data_ptr() for p in module.model.parameters()]
    rollout = distiller.sample(make_batch())
    (first,) = distiller.score(rollout)
    assert all(torch.equal(w, before[n]) for n, w in module.model.state_dict().items())
    assert places == [p.data_ptr() for p in module.model.parameters()]
    (again,) = make_module(make_model(1), make_model(1)).assemble(None).score(rollout)
    everything = slice(0, int(rollout.mask_BT.sum()))
    found, expected = (m.scores["teacher"].full.logps(everything) for m in (first, again))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("keys", "message"), [
    ({"prompt": None}, r"teacher\.prompt: expected a template"),
    ({"prompt": "no braces"}, r"teacher\.prompt: expected a value with \{prompt\}"),
    ({"reads": {"template": "{prompt}"}}, r"teacher\.reads\.template: expected one of system_prompt, examples"),
    ({"follow": "never"}, r"teacher\.follow: expected one of initial"),
    ({"follow_rate": 0.0}, r"teacher\.follow_rate: expected a value above 0"),
])  # fmt: skip
def test_a_section_that_cannot_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        section(**keys).check("teacher")


def test_scores_of_weights_that_would_have_moved_are_refused(make_model, make_module):
    with pytest.raises(UserError, match=r"optim\.updates_per_rollout: expected 1 with teacher\.follow=live"):
        make_module(make_model(1), section("live"), optim={"updates_per_rollout": 2})


def test_a_template_may_name_any_column_and_is_refused_by_its_own_key(tiny_tokenizer):
    rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "7=", "answer": "7"}]

    def ids(**keys):
        data = PromptDataModule(tokenizer=tiny_tokenizer, train_rows=rows, batch_size=2, shown={"teacher": keys})
        data.setup()
        (batch,) = data.train_dataloader()
        shown = batch.shown["teacher"]
        return [tiny_tokenizer.decode(i[m]) for i, m in zip(*shown, strict=True)], batch.rows

    found, order = ids(prompt_template="{answer}-{prompt}")
    assert found == [f"{row['answer']}-{row['prompt']}" for row in order]
    with pytest.raises(UserError, match=r"teacher\.prompt: expected only \{prompt\} and columns"):
        ids(prompt_template="{solution}{prompt}")
    with pytest.raises(UserError, match=r"teacher\.reads\.examples: expected nothing unless data.chat=true"):
        ids(examples=[{"user": "1", "assistant": "1"}])


def test_worked_turns_may_be_the_teachers_alone(make_tiny_tokenizer):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shown = {"teacher": {"examples": [{"user": "1+1=", "assistant": "2"}], "system_prompt": "9"}}
    data = PromptDataModule(tokenizer=tokenizer, train_rows=["7="], batch_size=1, shown=shown, chat=True)
    data.setup()
    (batch,) = data.train_dataloader()
    read = [tokenizer.decode(p.ids_BP[0][p.mask_BP[0]]) for p in (batch.prompts, batch.shown["teacher"])]
    assert read == ["7=", "91+1=27="]
