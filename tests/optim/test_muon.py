"""Muon as people use it: hidden matrices by Muon, all else by AdamW, and one optimizer to everybody else."""

import copy
import io

import peft
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from lit_opd.config import OptimConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.optim import build_optimizer, build_scheduler, outer_matrices
from lit_opd.runs.prepare import check_optimizer

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
IDS = torch.arange(4, 12)[None]
KEYWORDS = {"momentum": 0.9, "adamw": {"lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.0}}


def build(model, **keys):
    config = OptimConfig(name="Muon", lr=0.02, **keys)
    return build_optimizer(config, model.parameters(), outer_matrices(model)), config


def train(model, optimizer, steps, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def names_of(model, group):
    names = {weight: name for name, weight in model.named_parameters()}
    return {names[weight] for weight in group["params"]}


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_matrices_are_muons_and_all_else_is_adamws(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    (muon, adamw), names = build(model, kwargs=KEYWORDS)[0].param_groups, {n for n, _ in model.named_parameters()}
    assert names_of(model, muon) == {name for name in names if name.endswith("_proj.weight")}
    assert names_of(model, adamw) == {name for name in names if "norm" in name or "embed" in name or "lm_head" in name}
    assert (muon["momentum"], muon["lr"], muon["adjust_lr_fn"]) == (0.9, 0.02, "match_rms_adamw")
    assert (adamw["lr"], tuple(adamw["betas"]), adamw["weight_decay"], adamw["fused"]) == (0.01, (0.8, 0.9), 0.0, True)


def test_steps_are_those_of_torchs_two_optimizers(make_model):
    own, other = make_model(), make_model()
    train(own, build(own, kwargs=KEYWORDS)[0], 3)
    left = {id(weight) for weight in outer_matrices(other)}
    matrices = [weight for weight in other.parameters() if weight.ndim == 2 and id(weight) not in left]
    rest = [weight for weight in other.parameters() if all(weight is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    for _ in range(3):
        muon.zero_grad()
        adamw.zero_grad()
        train(other, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0), 1)
        muon.step()
        adamw.step()
    for weight, expected in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


def test_a_step_is_as_large_as_one_of_adamw():
    """Of a gradient without structure, by the rule of arXiv:2502.16982: a root mean square of 0.2 rates."""
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 256), (256, 32)):
        matrix = torch.nn.Parameter(torch.zeros(shape))
        matrix.grad = torch.randn(shape)
        build_optimizer(OptimConfig(name="Muon", lr=0.1), [matrix]).step()
        assert matrix.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.15)


def test_a_checkpoint_goes_on_bit_for_bit_and_a_schedule_moves_both_rates(make_model):
    whole, first = make_model(), make_model()
    keys = {"kwargs": KEYWORDS, "warmup_steps": 1, "scheduler": "ExponentialLR", "scheduler_kwargs": {"gamma": 0.5}}
    optimizer, config = build(whole, **keys)
    schedule = build_scheduler(config, optimizer)
    train(whole, optimizer, 4, schedule)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02 / 8, 0.01 / 8])
    optimizer, config = build(first, **keys)
    schedule = build_scheduler(config, optimizer)
    train(first, optimizer, 2, schedule)
    second = copy.deepcopy(first)
    resumed, _ = build(second, **keys)
    going_on = build_scheduler(config, resumed)
    saved = torch.load(torch_saved(optimizer.state_dict()), weights_only=True)
    resumed.load_state_dict(saved)
    going_on.load_state_dict(schedule.state_dict())
    train(second, resumed, 2, going_on)
    for weight, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, expected)


def torch_saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_adapters_of_hidden_layers_are_muons_and_those_of_embeddings_adamws(make_model):
    lora = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(make_model(), lora)
    optimizer, _ = build(model)
    muon, adamw = (names_of(model, group) for group in optimizer.param_groups)
    assert all(".q_proj.lora_" in name for name in muon)
    assert len(muon) == 4
    assert sorted(name.split(".")[-2] for name in adamw) == ["default", "lora_embedding_A", "lora_embedding_B"]
    train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"momentun": 0.9}, r"optim\.kwargs: expected keywords of torch\.optim\.Muon, found .*momentun"),
        ({"adamw": {"beta": 1}}, r"optim\.kwargs\.adamw: expected keywords of torch\.optim\.AdamW, found .*beta"),
        ({"adamw": 3}, r"optim\.kwargs\.adamw: expected a mapping, found 3"),
        ({"adjust_lr_fn": "rms"}, r"optim\.kwargs: .*rms is not supported"),
    ],
)
def test_mistakes_are_told_before_weights_load(keys, message):
    with pytest.raises(UserError, match=message) as error:
        check_optimizer(OptimConfig(name="Muon", kwargs=keys))
    assert "\n" not in str(error.value)


def test_stacked_matrices_are_adamws_and_it_is_said():
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 4), (3, 4, 4))]
    with pytest.warns(LintWarning, match=r"optim\.name: Muon trains matrices, so that AdamW trains 1 weights of more"):
        muon, adamw = build_optimizer(OptimConfig(name="Muon"), weights).param_groups
    assert [group["params"][0] is weight for group, weight in zip((muon, adamw), weights, strict=True)] == [True, True]


def test_what_muon_cannot_train_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"optim\.name: expected matrices of hidden layers that train, for Muon, found"):
        build_optimizer(OptimConfig(name="Muon"), [torch.nn.Parameter(torch.zeros(2))])
    narrow = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"optim\.kwargs\.nesterov: expected true for weights in bfloat16"):
        build_optimizer(OptimConfig(name="Muon", kwargs={"nesterov": False}), [narrow])
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"optim\.name: expected torch 2\.9 or newer, which has Muon, found torch 2"):
        check_optimizer(OptimConfig(name="Muon"))
