"""A teacher with another tokenizer: its gradient by enumeration, and the scorer against texts scored alone."""

import re
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
from lit_opd.functional import Head
from lit_opd.models import LanguageModel
from lit_opd.objective import student_loss
from lit_opd.runs.prepare import check_kinds, prepare_data
from lit_opd.teachers import AlignedScorer, LocalScorer, TextSpans, Wanted, own_scorer, wanted_by
from lit_opd.teachers.aligned import check_spans
from lit_opd.types import FinishReason, Prompts, SamplingLaw, ScoredRollout

HORIZON = 4
OWN, THEIRS = ["<eos>", "<unk>", "a", "b", "c"], ["c", "<unk>", "b", "<eos>", "ab", "ac", "a"]
EOS = OWN.index("<eos>")


class Law:
    """A model that is a table: the logits of what comes after every beginning of a completion."""

    def __init__(self, size, seed):
        self.size = size
        self.random = torch.Generator().manual_seed(seed)
        self.logits = {}

    def at(self, beginning):
        if beginning not in self.logits:
            logits_V = torch.randn(self.size, generator=self.random, dtype=torch.float64)
            if self.size == len(OWN):
                logits_V[OWN.index("<unk>")] = -1e4
            self.logits[beginning] = logits_V.requires_grad_()
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


def completions():
    """Every completion, with a stop or cut at the horizon."""
    letters = [index for index, token in enumerate(OWN) if token != "<unk>"]
    for length in range(1, HORIZON + 1):
        for ids in product(letters, repeat=length):
            if EOS not in ids[:-1] and (ids[-1] == EOS or length == HORIZON):
                yield list(ids)


def make_rollout(student):
    rows = list(completions())
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
    reference = LocalScorer(Law(len(OWN), 7), 3, "reference").score(rollout, wanted_by(estimators.build("token")))
    scores = {"teacher": teacher.score(rollout, wanted_by(estimator)), "reference": reference}
    probability_B1 = rollout.sampler_logps_BT.sum(1, keepdim=True).exp()
    assert float(probability_B1.sum()) == pytest.approx(1, abs=1e-12)
    weights_BT = rollout.mask_BT * probability_B1
    loss = student_loss(student, ScoredRollout(rollout, scores), estimator, weights_BT, 5).value
    return gradient(loss, student)


def gradient(loss, student):
    leaves = student.logits.values()
    found = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    return torch.stack([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)])


def in_theirs(ids, tokens, pattern):
    """The teacher's tokens of a completion."""
    words = re.findall(pattern, "".join(OWN[i] for i in ids if i != EOS))
    return [tokens.index(word) for word in [*words, *["<eos>"] * (ids[-1] == EOS)]]


def kl_of_completions(student, teacher, tokens, pattern):
    """The reverse KL between completions, the teacher's in its own tokens."""
    terms = []
    for ids in completions():
        logp = student.logp(ids)
        terms.append(logp.exp() * (logp - teacher.logp(in_theirs(ids, tokens, pattern)).detach()))
    return torch.stack(terms).sum()


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
@pytest.mark.parametrize("pattern", ["a[bc]|.", "aa|.", "ab|b+|."])
def test_the_expected_gradient_is_that_of_the_divergence_between_completions(pattern, estimator):
    """Though what follows an `a` decides whether it is a token of the teacher."""
    teacher_tokens = sorted({*THEIRS, "aa", "bb", "bbb", "bbbb"})
    student, teacher = Law(len(OWN), 1), Law(len(teacher_tokens), 2)
    text = TextSpans(word_tokenizer(OWN), word_tokenizer(teacher_tokens, pattern))
    found = expected_gradient(estimator, student, AlignedScorer(text, 0.0, LocalScorer(teacher, 3)))
    expected = gradient(kl_of_completions(student, teacher, teacher_tokens, pattern), student)
    close(found, expected, atol=1e-10)
    assert float(expected.norm()) > 1e-2


class AtTheirOwn(TextSpans):
    """Charges every span to its last token, though what follows decides it."""

    def align(self, ids, stopped=False):
        found = super().align(ids, stopped)
        return found._replace(decided={number: index for index, number in enumerate(found.spans)})


def test_charged_at_its_own_tokens_a_span_costs_the_token_that_decides_it_nothing():
    tokens, pattern = sorted({*THEIRS}), "a[bc]|."
    for seed in range(4):
        student, teacher = Law(len(OWN), seed), Law(len(tokens), seed + 20)
        text = AtTheirOwn(word_tokenizer(OWN), word_tokenizer(tokens, pattern))
        scorer = AlignedScorer(text, 0.0, LocalScorer(teacher, 3))
        found = expected_gradient(estimators.build("sequence"), student, scorer)
        expected = gradient(kl_of_completions(student, teacher, tokens, pattern), student)
        assert float((found - expected).norm()) > 0.01 * float(expected.norm())


def test_all_that_is_let_pass_was_tried():
    assert {case.values[0].spec.name for case in exact_for_spans()} == {"sequence", "leave_one_out", "hybrid"}


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


def test_all_tokens_of_the_teacher_are_charged_once_as_it_scores_them_alone(
    rollout, their_model, their_tokenizer, tiny_tokenizer
):
    text = TextSpans(tiny_tokenizer, their_tokenizer)
    scorer = AlignedScorer(text, 0.5, LocalScorer(LanguageModel(their_model, their_tokenizer, "teacher"), 3))
    parts = [rollout.rows(torch.tensor(part)) for part in ([0, 3], [1, 2, 4, 5, 6, 7, 8, 9])]
    kept = lost = 0
    for part, scores in zip(parts, scorer.score_each(parts, Wanted()), strict=True):
        charged_BT = torch.zeros(part.mask_BT.shape).masked_scatter(part.mask_BT, scores.logps_N)
        for row in range(len(part)):
            ids = part.ids_BT[row][part.real_BT[row]].tolist()
            found = text.align(ids, bool(part.finish_B[row] == FinishReason.STOP))
            prompt = part.shown["teacher"].ids_BP[row][part.shown["teacher"].mask_BP[row]].tolist()
            logps = their_model(torch.tensor([[*prompt, *found.ids]])).logits[0].log_softmax(-1)
            mask = part.mask_BT[row].tolist()
            holes = {-1} | {n for n, counts in zip(found.spans, mask, strict=False) if not counts}
            alone = [
                logps[len(prompt) + t - 1, found.ids[t]] for t, n in enumerate(found.teacher_spans) if n not in holes
            ]
            # What is left of a span with a hole costs nothing.
            left = [part.sampler_logps_BT[row][t] for t, n in enumerate(found.spans) if n in holes and mask[t]]
            expected, kept, lost = float(sum(alone) + sum(left)), kept + len(alone), lost + len(left)
            assert charged_BT[row].sum().item() == pytest.approx(expected, abs=1e-4)
    assert kept > 20
    assert lost


def test_with_the_students_tokenizer_a_row_has_the_plain_teachers_log_probability(
    make_model, make_batch, sample, tiny_tokenizer
):
    """Of a row, not of its tokens: each is charged where later ones can no longer change it."""
    batch = make_batch()
    rollout = sample(make_model(1), batch._replace(shown={"teacher": batch.prompts}), SamplingLaw(), 2)
    inner = LocalScorer(LanguageModel(make_model(2), tiny_tokenizer, "teacher"), 3)
    plain = inner.score(rollout, Wanted())
    found = AlignedScorer(TextSpans(tiny_tokenizer, tiny_tokenizer), 1.0, inner).score(rollout, Wanted())
    assert found.aligned_N.all()
    sums = [
        torch.zeros(rollout.mask_BT.shape).masked_scatter(rollout.mask_BT, s.logps_N).sum(1) for s in (found, plain)
    ]
    close(*sums, atol=1e-4)


def test_a_served_teacher_is_the_local_one(rollout, their_model, their_tokenizer, their_folder, tiny_tokenizer):
    text = TextSpans(tiny_tokenizer, their_tokenizer)
    inner = LocalScorer(LanguageModel(their_model, their_tokenizer, "teacher"), 3)
    with TeacherStandIn(their_model, their_tokenizer).listening() as address:
        section = TeacherConfig(
            kind="served", server=address, path=their_folder, least_aligned=0.5, patience_s=5.0, top_k=0
        )
        served = own_scorer(section, "", tiny_tokenizer)
        found, expected = (one.score(rollout, Wanted()) for one in (served, AlignedScorer(text, 0.5, inner)))
        kept = served.state()
        served.load_state(kept)
        with pytest.raises(UserError, match=r"teacher\.server: expected the weights that the run began with"):
            served.load_state(kept | {"logps": [value + 1 for value in kept["logps"]]})
    assert kept["gap"] is None, "the gap is one of the student's own tokens"
    close(found.logps_N, expected.logps_N, atol=1e-4)
    assert torch.equal(found.aligned_N, expected.aligned_N)


@pytest.fixture
def teacher(their_folder):
    return lambda least=0.3, **keys: {"path": their_folder, "least_aligned": least, "dtype": "float32", **keys}


def test_training_and_evaluation_compare_spans(teacher, make_model, make_module, fit, make_data, make_trainer):
    with pytest.warns(LintWarning, match=r"without the teacher's whole distributions, val/\* has no reverse_kl"):
        module = make_module(make_model(1), teacher(prompt="{prompt}1="), "sequence", rollout={"max_new_tokens": 14})
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
    module = make_module(make_model(1), teacher(0.99), "sequence", rollout={"max_new_tokens": 14})
    before = {name: weight.clone() for name, weight in module.model.named_parameters()}
    with pytest.raises(UserError, match=r"teacher\.least_aligned: expected at least 0\.99 of .* in the first rollout"):
        fit(module)
    assert all(torch.equal(weight, before[name]) for name, weight in module.model.named_parameters())


def test_the_datas_own_texts_are_held_to_the_share_before_weights_load(tmp_path, student_path, teacher):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "12+5=", "answer": "17"}\n{"prompt": "34-1=", "answer": "33"}\n')
    keys = [f"student.path={student_path}", f"data.path={rows}", "data.validation_size=1", "data.batch_size=1"]
    keys += ["rollout.max_new_tokens=8", "estimator.name=sequence"]
    keys += [f"teacher.{key}={value}" for key, value in teacher(0.7).items()]
    expected = r"teacher\.least_aligned: expected at least 0\.7 .* found 0\.429 in the first 1 rows of the data"
    with pytest.raises(UserError, match=expected):
        prepare_data(load_config([], keys))


@pytest.mark.parametrize(("keys", "name", "more", "message"), [
    ({}, "full_vocab", {}, r"estimator\.name: expected one that asks this teacher for no more than token"),
    ({}, "teacher_topk", {}, r"estimator\.name: expected one that asks this teacher for no more than token"),
    ({}, "token", {}, r"estimator\.name: expected an unbiased estimator .* found 'token'\. Set estimator\.name=sequen"),
    ({}, "length_normalised", {}, r"estimator\.name: expected an unbiased estimator of the reverse KL of whole compl"),
    ({}, "sequence", {"merged_stops": "auto"}, r"estimator\.merged_stops: expected null"),
    ({}, "sequence", {"rollout": {"student_share": 0.5, "demonstrations": "teacher"}}, r"rollout\.demonstrations: "),
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
        check_kinds(load_config([], keys), command, "local")
