"""Evidence made of models in memory, and of numbers written by hand."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lit_opd import estimators
from lit_opd.config import Config, EstimatorConfig, OptimConfig, StudentConfig, TeacherConfig
from lit_opd.distiller import Distiller
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.readings import Readings
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.teachers import LocalScorer
from lit_opd.types import Estimate, SamplingLaw

EOS = 2
OPTIM = OptimConfig(name="SGD", lr=0.01, clip_norm=None)


@pytest.fixture(scope="session")
def models(make_model):
    """A student and a teacher. Only their heads differ, so that a step on the head alone can close the gap."""
    student = make_model(seed=1)
    teacher = copy.deepcopy(student)
    torch.manual_seed(0)
    with torch.no_grad():
        teacher.lm_head.weight += 0.2 * torch.randn_like(teacher.lm_head.weight)
    return student, teacher


@pytest.fixture(scope="session")
def swap():
    """Makes a copy of a model that writes the one token where it wrote the other."""

    def run(model, first, second):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight[[first, second]] = model.lm_head.weight[[second, first]]
        return other

    return run


@pytest.fixture(scope="session")
def make_evidence(models, tiny_tokenizer, make_batch):
    """Makes evidence of 64 completions of 8 tokens at most, by default of the pair above."""

    def make(
        student=None, teacher=None, estimator="full_vocab", sampler=None, law=None, masked=(), optim=OPTIM, **kwargs
    ):
        student, teacher = student or models[0], teacher or models[1]
        own = LanguageModel(student, tiny_tokenizer, "student")
        other = LanguageModel(copy.deepcopy(teacher), tiny_tokenizer, "teacher", own_precision=True).freeze()
        sampler = LanguageModel(sampler or student, tiny_tokenizer, "student")
        batch = make_batch(tuple(f"{i}+{i + 1}=" for i in range(16)))
        batch = batch._replace(places=list(range(16)))
        numbers = uniforms((0, 0), batch.draws, 4, 8)
        rollout = LocalEngine().sample(sampler, batch, law or SamplingLaw(), 4, numbers)
        shown = LocalEngine().sample(other, batch, SamplingLaw(), 4, numbers)
        rollout = rollout.uncount(torch.isin(rollout.ids_BT, torch.tensor(masked, dtype=torch.long)))
        config = Config(student=StudentConfig(path="."), teacher=TeacherConfig(path="."), optim=optim,
                        estimator=EstimatorConfig(masked_tokens=list(masked)))  # fmt: skip
        distiller = Distiller(own, estimators.build(estimator, **kwargs), None, {"teacher": LocalScorer(other, 64)}, 64,
                              optim.micro_batch_tokens, config.estimator.aggregation)  # fmt: skip
        return Evidence(config, distiller, rollout, shown, nullcontext)

    return make


@pytest.fixture
def by_hand(tiny_tokenizer):
    """Makes evidence of nothing but numbers: rows of (id, log-ratio, the teacher's first choice, counted)."""

    def make(rows, stops=(EOS,), teacher_stops=(EOS,), masked=(), **own):
        ids, ratios, expected, counted = (list(column) for column in zip(*rows, strict=True))
        count, student = len(rows), torch.full((len(rows),), -0.5)
        places = torch.arange(count)
        values = {
            "ids_N": torch.tensor(ids), "row_N": places, "place_N": places, "counted_N": torch.tensor(counted),
            "sampler_logps_N": student, "law_logps_N": student, "student_logps_N": student,
            "teacher_logps_N": student - torch.tensor(ratios), "stop_logps_N": torch.zeros(count),
            "entropy_N": torch.zeros(count), "top_ids_N": torch.tensor(expected), "top_logps_N": torch.zeros(count),
        } | own  # fmt: skip
        return SimpleNamespace(
            readings=Readings(**values), student=SimpleNamespace(stop_ids=list(stops), tokenizer=tiny_tokenizer),
            teacher=SimpleNamespace(stop_ids=list(teacher_stops)), rollout=range(count),
            config=Config(estimator=EstimatorConfig(masked_tokens=list(masked))),
            token=lambda i: repr(tiny_tokenizer.convert_ids_to_tokens(int(i))),
        )  # fmt: skip

    return make


@pytest.fixture
def register():
    """Registers a function of (log-ratio, student's log-probabilities) under a name."""

    def run(name, loss, **contract):
        @estimators.register_estimator(name, source="here", **contract)
        def function(tokens):
            log_ratio = tokens.student_logps_BT.detach() - tokens.teacher_logps_BT
            return Estimate(loss(log_ratio, tokens.student_logps_BT), log_ratio)

        return function

    return run


@pytest.fixture
def with_readings():
    """The same evidence with other numbers at its positions."""

    def run(evidence, **values):
        other = replace(evidence)
        vars(other)["readings"] = replace(evidence.readings, **values)
        return other

    return run
