"""A verifier of a user's own is rehearsed, bounded, and ends a run in one line or is counted."""

import re
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from lit_opd.config import DataConfig
from lit_opd.data.datamodule import PromptDataModule
from lit_opd.data.guarded import Guarded, tell_constant
from lit_opd.errors import LintWarning, RunError, UserError
from lit_opd.measures.intervals import Interval

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "solution": str(i + 1)} for i in range(6)]


def right(completion, row):
    return float(completion.strip() == row["answer"])


def guard(verify, **keys):
    return Guarded(verify, DataConfig(**keys))


@pytest.mark.parametrize("reward", [1, True, 0.5, np.float32(1), np.bool_(True), torch.tensor(1.0)])
def test_numbers_from_0_to_1_are_rewards(reward):
    found = guard(lambda completion, row: reward)("a", ROWS[0])
    assert type(found) is float
    assert found == float(reward)


def fails(kind):
    def verify(completion, row):
        if kind == "raises":
            return completion[99]
        if kind == "exits":
            raise SystemExit(0)
        if kind == "hangs":
            while True:
                try:
                    time.sleep(1)
                except Exception:
                    continue
        return {"none": None, "nan": float("nan"), "seven": 7, "minus": -0.1, "text": "1", "tensor": torch.ones(2)}[
            kind
        ]

    return verify


FAILURES = {"raises": "IndexError", "exits": "SystemExit", "hangs": "nothing within 0.05 s", "none": "found None",
            "nan": "found nan", "seven": "found 7", "minus": "found -0.1", "text": "found '1'",
            "tensor": "only one element"}  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_stops_in_one_line_or_is_counted(kind):
    with pytest.raises(RunError) as error:
        guard(fails(kind), verifier_seconds=0.05)("the text", ROWS[2])
    line = str(error.value)
    assert "\n" not in line
    for part in ("data.verifier: expected a number from 0 to 1", FAILURES[kind], "'the text'", "'2+1='", "zero"):
        assert part in line
    counting = guard(fails(kind), verifier_seconds=0.05, on_verifier_error="zero")
    with pytest.warns(LintWarning, match=r"^data\.verifier: .* The reward is 0, and counted\.$") as record:
        assert [counting("a", ROWS[0]), counting("b", ROWS[1])] == [0.0, 0.0]
    assert counting.failures() == [True, True]
    assert len(record) == 1
    assert counting.failures() == []


def test_ctrl_c_is_no_error_of_the_verifier():
    def verify(completion, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard(verify, on_verifier_error="zero")("a", ROWS[0])


def test_the_time_limit_leaves_other_timers_alone():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    left = signal.setitimer(signal.ITIMER_REAL, 0.3)  # pytest-timeout's own
    try:
        assert guard(right)("1", ROWS[0]) == 1.0
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.35)
        assert rung == [True]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(guard(right)("1", ROWS[0])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def takes_the_answer(completion, answer):
    return float(completion.strip() == answer)


def prints_the_answer(completion, answer):
    return completion.strip() == str(answer).strip()


def looks_in_the_answer(completion, answer):
    return completion in answer


def strips_the_answer(completion, answer):
    return completion.strip() == answer.strip()


def searches_for_the_answer(completion, answer):
    return re.search(answer, completion) is not None


def counts_the_answer(completion, answer):
    return len(completion) == len(answer)


def goes_through_the_answer(completion, answer):
    return any(letter in completion for letter in answer)


def one_argument(completion):
    return 1.0


def module(tokenizer, verifier, **keys):
    rows = {"train_rows": ROWS[:4], "validation_rows": ROWS[4:]}
    return PromptDataModule(tokenizer=tokenizer, verifier=verifier, batch_size=2, **rows, **keys)


@pytest.mark.parametrize(
    "verify",
    [
        takes_the_answer,
        prints_the_answer,
        looks_in_the_answer,
        strips_the_answer,
        searches_for_the_answer,
        counts_the_answer,
        goes_through_the_answer,
        one_argument,
    ],
)
@pytest.mark.parametrize("on_error", ["stop", "zero"])
def test_a_verifier_of_another_form_is_refused_before_training(verify, on_error, tokenizer):
    with pytest.raises(UserError, match=r"data\.verifier.*called as verifier\(completion, row\)"):
        module(tokenizer, verify, on_verifier_error=on_error).setup("fit")


@pytest.mark.parametrize(
    ("verify", "told"),
    [
        (right, None),
        (lambda completion, row: len(row["answer"]) > 5, "0 from .* for the answer in column 'answer' itself"),
        (lambda completion, row: 1.0, "1 from .* for an empty text"),
        (lambda completion, row: {**row}["answer"] in completion, None),
        (lambda completion, row: completion == row.get("solved"), r"<lambda> asks for columns .* 4 rows has: 'solved'"),
    ],
)
def test_rehearsal_tells_a_verifier_that_judges_all_alike(verify, told, tokenizer):
    if told:
        with pytest.warns(LintWarning, match=rf"^data\.verifier: {told}"):
            module(tokenizer, verify).setup("fit")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", LintWarning)
            module(tokenizer, verify).setup("fit")


def test_rehearsal_is_made_once_and_counts_nothing(tokenizer):
    asked = []

    def verify(completion, row):
        asked.append(completion)
        return right(completion, row)

    data = module(tokenizer, verify)
    data.setup("fit")
    data.setup("validate")
    assert sorted(asked) == [""] * 6 + [row["answer"] for row in ROWS]
    assert data.verifier.failures() == []


def test_an_empty_text_may_fail_where_failures_are_zeros(tokenizer):
    def verify(completion, row):
        return completion[0] == row["answer"][0]

    module(tokenizer, verify, on_verifier_error="zero").setup("fit")
    with pytest.raises(UserError, match=r"data\.verifier.*IndexError"):
        module(tokenizer, verify).setup("fit")


def test_every_answer_must_have_a_number_for_last_number(tokenizer):
    rows = [*({"prompt": "a", "answer": "1"} for _ in range(20)), {"prompt": "b", "answer": "none"}]
    data = PromptDataModule(tokenizer=tokenizer, train_rows=rows, verifier="last_number", batch_size=1)
    with pytest.raises(UserError, match=r"data\.answer_column.*'none'"):
        data.setup("fit")


def test_a_misspelt_answer_column_is_refused_beside_an_own_verifier(tokenizer):
    with pytest.raises(UserError, match=r"data\.answer_column.*'answr'.*columns prompt, answer, solution"):
        module(tokenizer, right, answer_column="answr").setup("fit")
    module(tokenizer, right, answer_column="solution").setup("fit")


@pytest.mark.parametrize(
    ("accuracy", "told"), [(0.0, "prompts is 0."), (1.0, "prompts is 1."), (0.5, None), (None, None)]
)
def test_a_teacher_that_is_right_on_all_or_nothing_is_told(accuracy, told):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        tell_constant({} if accuracy is None else {"accuracy": Interval(accuracy, 0.0, 1.0)})
    assert [told in str(w.message) for w in record] == ([True] if told else [])


def test_errors_are_counted_in_the_results(make_model, make_module, make_trainer, tiny_tokenizer):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]

    def verify(completion, row):
        return None if completion and row["prompt"] == "1+1=" and completion != row["answer"] else 0.5

    data = PromptDataModule(tokenizer=tiny_tokenizer, train_rows=rows, validation_rows=rows, verifier=verify,
                            batch_size=4, on_verifier_error="zero")  # fmt: skip
    settings = {"rollout": {"max_new_tokens": 4, "num_completions": 3, "min_new_tokens": 4}}
    module = make_module(make_model(1), make_model(2), estimator="outcome", **settings)
    trainer = make_trainer(max_steps=1, limit_val_batches=1)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["rollout/verifier_error_frac"]) == 0.25
    assert module.results["val"]["verifier_error_frac"].mean == 0.25
    data.verifier.stops = True
    with pytest.raises(RunError, match=r"data\.verifier.*found None for the completion"):
        trainer.validate(module, data)
