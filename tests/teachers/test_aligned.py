"""A teacher with another tokenizer: its gradient by enumeration, and the scorer against texts scored alone."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from references import close, rollout_from
from shared_fixtures import CHARACTERS
from teachers.teacher_servers import TeacherStandIn
from teachers.two_tokenizers import word_tokenizer

from lit_opd import estimators
from lit_opd.config import TeacherConfig, load_config
from lit_opd.data import pad_left
from lit_opd.errors import LintWarning, UserError
from lit_opd.estimators import registry
from lit_opd.estimators.oracle import laws
from lit_opd.functional import Head, ends_of_spans, sum_spans
from lit_opd.models import LanguageModel
from lit_opd.objective import student_loss
from lit_opd.runs.prepare import check_local_teacher, prepare_data
from lit_opd.teachers import AlignedScorer, LocalScorer, TextSpans, Wanted, own_scorer, wanted_by
from lit_opd.teachers.aligned import check_spans
from lit_opd.types import FinishReason, Prompts, SamplingLaw, ScoredRollout

HORIZON = 4
OWN, THEIRS = ["<eos>", "<unk>", "a", "b", "c"], ["c", "<unk>", "b", "<eos>", "ab", "ac", "a"]
EOS, A = OWN.index("<eos>"), OWN.index("a")
SPANS = TextSpans(word_tokenizer(OWN), word_tokenizer(THEIRS, "a[bc]|."))


class Law:
    """A model that is a table: the logits of what comes after every beginning of a completion."""

    def __init__(self, size, seed, allowed=lambda beginning, index: True):
        self.size, self.allowed = size, allowed
        self.random = torch.Generator().manual_seed(seed)
        self.logits = {}

    def at(self, beginning):
        if beginning not in self.logits:
            logits_V = torch.randn(self.size, generator=self.random, dtype=torch.float64)
            ruled_out = torch.tensor([not self.allowed(beginning, index) for index in range(self.size)])
            self.logits[beginning] = logits_V.masked_fill(ruled_out, -1e4).requires_grad_()
        return self.logits[beginning]

    def logp(self, ids):
        return sum(self.at(tuple(ids[:t])).log_softmax(-1)[index] for t, index in enumerate(ids))

    def hidden(self, rollout):
        rows = zip(rollout.ids_BT.tolist(), rollout.mask_BT.tolist(), strict=True)
        found = [self.at(tuple(ids[:t])) for ids, mask in rows for t, counts in enumerate(mask) if counts]
        return torch.stack(found), Head(torch.eye(self.size, dtype=torch.float64))

    def evaluating(self):
        return nullcontext()

    precision = evaluating


def decided(beginning, index):
    """Rules out what would decide, after the fact, that an `a` is a token of the teacher: only `b` or `c` follows."""
    return index != OWN.index("<unk>") and (beginning[-1:] != (A,) or OWN[index] in "bc")


def undecided(beginning, index):
    return index != OWN.index("<unk>")


def completions(student):
    """Every completion, with a stop or cut at the horizon."""
    allowed = range(len(OWN))
    for length in range(1, HORIZON + 1):
        for ids in product(allowed, repeat=length):
            whole = EOS in ids[:-1] or (ids[-1] != EOS and length < HORIZON)
            if not whole and all(student.allowed(ids[:t], index) for t, index in enumerate(ids)):
                yield list(ids)


def make_rollout(student):
    rows = list(completions(student))
    lengths_B1 = torch.tensor([[len(ids)] for ids in rows])
    ids_BT = torch.tensor([ids + [0] * (HORIZON - len(ids)) for ids in rows])
    real_BT = torch.arange(HORIZON) < lengths_B1
    logps = [[student.at(tuple(ids[:t])).log_softmax(-1)[i].item() for t, i in enumerate(ids)] for ids in rows]
    logps_BT = torch.tensor([one + [0.0] * (HORIZON - len(one)) for one in logps], dtype=torch.float64)
    finish_B = torch.tensor([FinishReason.STOP if ids[-1] == EOS else FinishReason.LENGTH for ids in rows])
    prompts = torch.zeros(len(rows), 1, dtype=torch.long), torch.ones(len(rows), 1, dtype=torch.bool)
    made = rollout_from(*prompts, ids_BT, real_BT, real_BT, logps_BT, finish_B, SamplingLaw(), torch.arange(len(rows)))
    return replace(made, rewards_B=torch.rand(len(rows), dtype=torch.float64), shown={"teacher": Prompts(*prompts)})


def expected_gradient(estimator, student, teacher):
    """The mean gradient over all completions, each as probable as it is, in the order of the student's beginnings."""
    rollout = make_rollout(student)
    scorer = AlignedScorer(SPANS, 0.0, LocalScorer(teacher, 3))
    reference = LocalScorer(Law(len(OWN), 7), 3, "reference").score(rollout, wanted_by(estimators.build("token")))
    scores = {"teacher": scorer.score(rollout, wanted_by(estimator)), "reference": reference}
    probability_B1 = rollout.sampler_logps_BT.sum(1, keepdim=True).exp()
    assert float(probability_B1.sum()) == pytest.approx(1, abs=1e-12)
    weights_BT = rollout.mask_BT * probability_B1
    loss = student_loss(student, ScoredRollout(rollout, scores), estimator, weights_BT, 5).value
    return gradient(loss, student)


def gradient(loss, student):
    leaves = student.logits.values()
    found = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    return torch.stack([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)])


def in_theirs(ids):
    """The teacher's tokens of a completion, by the rules of its language alone."""
    text, found = "".join(OWN[i] for i in ids if i != EOS), []
    while text:
        size = 2 if text[:2] in THEIRS else 1
        found.append(THEIRS.index(text[:size]))
        text = text[size:]
    return found + [THEIRS.index("<eos>")] * (ids[-1] == EOS)


def kl_of_completions(student, teacher):
    """The reverse KL between completions, the teacher's in its own tokens."""
    terms = []
    for ids in completions(student):
        logp = student.logp(ids)
        terms.append(logp.exp() * (logp - teacher.logp(in_theirs(ids)).detach()))
    return torch.stack(terms).sum()


def kl_of_spans(student, teacher):
    """The reverse KL of the next span, at every beginning of one, each as often as it is reached."""
    total = torch.zeros((), dtype=torch.float64)
    waiting = [[]]
    while waiting:
        start = waiting.pop()
        before = in_theirs(start) if start else []
        reached = student.logp(start).exp().detach() if start else 1.0
        for ids in spans_after(start, student):
            logp = student.logp(start + ids) - (student.logp(start) if start else 0)
            other = teacher.logp(in_theirs(start + ids)) - (teacher.logp(before) if before else 0)
            total = total + reached * logp.exp() * (logp - other.detach())
            if len(start + ids) < HORIZON and ids[-1] != EOS:
                waiting.append(start + ids)
    return total


def spans_after(start, student):
    for index in range(len(OWN)):
        if not student.allowed(tuple(start), index):
            continue
        if index != A or len(start) + 1 == HORIZON:
            yield [index]
        else:
            yield from ([A, OWN.index(letter)] for letter in "bc")


def exact_for_spans():
    for name in registry.names():
        spec = registry.get(name)
        for keywords in laws.cases(spec) if spec.kind == "estimator" else ():
            estimator = estimators.build(name, **keywords)
            if wanted_by(estimator).kinds == {"token"} and passes(estimator):
                yield pytest.param(estimator, id=f"{name}-{keywords}")


def passes(estimator):
    try:
        check_spans(estimator)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("estimator", exact_for_spans())
def test_the_expected_gradient_is_that_of_the_divergence_between_spans(estimator):
    student, teacher = Law(len(OWN), 1, decided), Law(len(THEIRS), 2)
    found = expected_gradient(estimator, student, teacher)
    whole = estimator.contract.target == "sequence_reverse_kl"
    expected = gradient((kl_of_completions if whole else kl_of_spans)(student, teacher), student)
    close(found, expected, atol=1e-10)
    assert float(expected.norm()) > 1e-2


def test_all_that_is_let_pass_was_tried():
    names = {case.values[0].spec.name for case in exact_for_spans()}
    assert {"token", "k2_loss", "sequence", "leave_one_out", "importance_reverse_kl", "ppo_reverse_kl"} <= names


def test_a_cut_that_a_later_token_decides_costs_the_return_its_exactness():
    """A limit that the documents tell: what follows an `a` decides whether it is a span, and pays for it no more."""
    student, teacher = Law(len(OWN), 1, undecided), Law(len(THEIRS), 2)
    found = expected_gradient(estimators.build("sequence"), student, teacher)
    expected = gradient(kl_of_completions(student, teacher), student)
    assert 1e-3 < float((found - expected).norm() / expected.norm()) < 0.5


TOKENS = ["<end>", "<unk>", *map("".join, product("0123456789", repeat=2)), *reversed(CHARACTERS)]
PATTERN = r"\d\d|."


@pytest.fixture(scope="module")
def their_tokenizer():
    return word_tokenizer(TOKENS, PATTERN, eos="<end>")


@pytest.fixture(scope="module")
def their_model(make_model):
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    return make_model(3, hidden_size=24, vocab_size=len(TOKENS) + 3, **ends)  # with rows that no token has


@pytest.fixture(scope="module")
def their_folder(their_model, their_tokenizer, save_model):
    return save_model(their_model, their_tokenizer)


def shown(batch, tokenizer):
    ids = [tokenizer(row["prompt"])["input_ids"] for row in batch.rows]
    return batch._replace(shown={"teacher": Prompts(*pad_left(ids, 999))})  # an id that the teacher does not have


@pytest.fixture
def rollout(make_model, make_batch, sample, their_tokenizer):
    """Ten completions in which most spans are of one token, and some of two; with holes in their mask."""
    found = sample(make_model(1), shown(make_batch(), their_tokenizer), SamplingLaw(), num_completions=2, length=14)
    return found.uncount(found.ids_BT == 7)


def test_a_span_has_the_log_probability_that_the_teacher_alone_gives_its_text(
    rollout, their_model, their_tokenizer, tiny_tokenizer
):
    text = TextSpans(tiny_tokenizer, their_tokenizer)
    scorer = AlignedScorer(text, 0.5, LocalScorer(LanguageModel(their_model, their_tokenizer, "teacher"), 3))
    first, *rest = [torch.tensor(part) for part in ([0, 3], [1, 2, 4, 5, 6, 7, 8, 9])]
    parts = [rollout.rows(part) for part in (first, *rest)]
    lengths = []
    for part, scores in zip(parts, scorer.score_each(parts, Wanted()), strict=True):
        sums = sum_spans(scores.logps_N, scores.spans_N)[ends_of_spans(scores.spans_N)].tolist()
        expected = []
        for row in range(len(part)):
            ids = part.ids_BT[row][part.real_BT[row]].tolist()
            found = text.align(ids, bool(part.finish_B[row] == FinishReason.STOP))
            prompt = part.shown["teacher"].ids_BP[row][part.shown["teacher"].mask_BP[row]].tolist()
            logps = their_model(torch.tensor([[*prompt, *found.ids]])).logits[0].log_softmax(-1)
            for number in range(max(found.spans) + 1):
                own = [t for t, n in enumerate(found.spans) if n == number]
                if part.mask_BT[row][own].all():
                    places = [len(prompt) + t for t, n in enumerate(found.teacher_spans) if n == number]
                    expected.append(sum(logps[t - 1, found.ids[t - len(prompt)]].item() for t in places))
                    lengths.append(len(own))
        assert sums == pytest.approx(expected, abs=1e-4)
        ends_N = ends_of_spans(scores.spans_N)  # the others have what the sampler recorded, so that they cost nothing
        sampler_N = part.sampler_logps_BT[part.mask_BT]
        assert torch.equal(scores.logps_N[~ends_N], sampler_N[~ends_N])
    assert {1, 2} <= set(lengths)
    assert (rollout.ids_BT == 7).any()


def test_a_served_teacher_is_the_local_one(rollout, their_model, their_tokenizer, their_folder, tiny_tokenizer):
    text = TextSpans(tiny_tokenizer, their_tokenizer)
    inner = LocalScorer(LanguageModel(their_model, their_tokenizer, "teacher"), 3)
    with TeacherStandIn(their_model, their_tokenizer).listening() as address:
        section = TeacherConfig(
            kind="served", server=address, path=their_folder, least_aligned=0.5, patience_s=5.0, top_k=0
        )
        served = own_scorer(section, "", tiny_tokenizer)
        found, expected = (one.score(rollout, Wanted()) for one in (served, AlignedScorer(text, 0.5, inner)))
    close(found.logps_N, expected.logps_N, atol=1e-4)
    assert torch.equal(found.spans_N, expected.spans_N)


@pytest.fixture
def teacher(their_folder):
    return lambda least=0.3, **keys: {"path": their_folder, "least_aligned": least, "dtype": "float32", **keys}


def test_training_and_evaluation_compare_spans(teacher, make_model, make_module, fit, make_data, make_trainer):
    with pytest.warns(LintWarning, match=r"without the teacher's whole distributions, val/\* has no reverse_kl"):
        module = make_module(make_model(1), teacher(prompt="{prompt}1="), "token", rollout={"max_new_tokens": 14})
    record = fit(module, 2)
    found = {name: float(value) for name, value in record.metrics[0].items()}
    (rollout, stats), *_ = module.seen
    assert 0.3 < found["train/aligned_frac"] < 1
    assert found["rollout/sampler_gap"] == pytest.approx(0, abs=1e-5)
    assert stats["kl"].sum() == pytest.approx(float((stats["student_logps"] - stats["teacher_logps"]).sum()), rel=1e-3)
    prompts = rollout.shown["teacher"]
    assert their_text(module, prompts.ids_BP[0][prompts.mask_BP[0]]).endswith("1=")
    make_trainer(limit_val_batches=1).validate(module, make_data(), verbose=False)
    assert {"teacher_nll", "student_entropy"} <= set(module.results["val"])
    assert "reverse_kl" not in module.results["val"]


def their_text(module, ids):
    return module.scorer.text.teacher.decode(ids)


def test_the_first_rollout_is_refused_where_it_has_too_few_aligned_tokens(teacher, make_model, make_module, fit):
    module = make_module(make_model(1), teacher(0.99), "token", rollout={"max_new_tokens": 14})
    before = {name: weight.clone() for name, weight in module.model.named_parameters()}
    with pytest.raises(UserError, match=r"teacher\.least_aligned: expected at least 0\.99 of .* in the first rollout"):
        fit(module)
    assert all(torch.equal(weight, before[name]) for name, weight in module.model.named_parameters())


def test_the_datas_own_texts_are_held_to_the_share_before_weights_load(tmp_path, student_path, teacher):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "12+5=", "answer": "17"}\n{"prompt": "34-1=", "answer": "33"}\n')
    keys = [f"student.path={student_path}", f"data.path={rows}", "data.validation_size=1", "data.batch_size=1"]
    keys += ["rollout.max_new_tokens=8", "estimator.name=token"]
    keys += [f"teacher.{key}={value}" for key, value in teacher(0.7).items()]
    expected = r"teacher\.least_aligned: expected at least 0\.7 .* found 0\.429 in the first 1 rows of the data"
    with pytest.raises(UserError, match=expected):
        prepare_data(load_config([], keys))


@pytest.mark.parametrize(("keys", "name", "more", "message"), [
    ({}, "full_vocab", {}, r"estimator\.name: expected one that asks this teacher for no more than token"),
    ({}, "teacher_topk", {}, r"estimator\.name: expected one that asks this teacher for no more than token"),
    ({}, "k3_loss", {}, r"estimator\.name: expected an unbiased estimator .* found 'k3_loss'\. Set estimator\.name=to"),
    ({}, "clipped_log_ratio", {}, r"estimator\.name: expected an unbiased estimator of the reverse KL for a teacher"),
    ({}, "token", {"merged_stops": "auto"}, r"estimator\.merged_stops: expected null"),
    ({}, "token", {"rollout": {"student_share": 0.5, "demonstrations": "teacher"}}, r"rollout\.demonstrations: expect"),
    ({"least_aligned": 1.5}, "token", {}, r"teacher\.least_aligned: expected a value from 0 to 1"),
    ({"kind": "student"}, "token", {}, r"teacher\.least_aligned: expected null: the student's tokenizer is its own"),
    ({"path": ""}, "token", {}, r"teacher\.path: expected a value"),
    ({"path": "", "kind": "served", "server": "http://127.0.0.1:1"}, "token", {}, r"teacher\.path: expected a folder"),
    ({"least_aligned": None}, "token", {}, r"teacher\.path: expected the student's tokenizer, .* set teacher\.least_"),
])  # fmt: skip
def test_what_spans_cannot_do_is_refused(keys, name, more, message, teacher, make_model, make_module):
    kwargs = {"estimator_kwargs": {"k": 3}} if name == "teacher_topk" else {}
    with pytest.raises(UserError, match=message):
        make_module(make_model(1), teacher(**keys), name, **more, **kwargs)


def test_one_of_several_teachers_has_the_students_tokens(teacher, make_model, make_module):
    with pytest.raises(UserError, match=r"teachers\.a: expected a teacher that reads the student's tokens, as one of"):
        make_module(make_model(1), None, "token", teachers={"a": teacher(), "b": make_model(2)})


def test_a_row_longer_than_the_teachers_context_is_refused(rollout, their_model, their_tokenizer, tiny_tokenizer):
    inner = LocalScorer(LanguageModel(their_model, their_tokenizer, "teacher"), 3)
    scorer = AlignedScorer(TextSpans(tiny_tokenizer, their_tokenizer), 0.5, inner, context=8)
    with pytest.raises(UserError, match=r"rollout\.max_new_tokens: expected prompt and completion to be at most 8"):
        scorer.score(rollout, Wanted())
    with pytest.raises(UserError, match=r"data: expected prompts in the tokens of the teacher"):
        scorer.score(replace(rollout, shown={}), Wanted())


@pytest.mark.parametrize("command", ["measure", "audit"])
def test_commands_that_read_whole_distributions_refuse_it(command, student_path, teacher):
    keys = [f"student.path={student_path}", *(f"teacher.{key}={value}" for key, value in teacher().items())]
    with pytest.raises(UserError, match=rf"teacher\.least_aligned: expected null for {command}"):
        check_local_teacher(load_config([], keys), command)
