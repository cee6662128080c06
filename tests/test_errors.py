import pytest

from lit_opd.errors import RunError, UserError, UserErrors, choose, gather, suggest


def test_user_error_is_one_line_with_its_four_parts():
    error = UserError("optim.lr", "a\nnumber", ["x\n", 1], "Set   it.")
    assert str(error) == "optim.lr: expected a number, found ['x\\n', 1]. Set it."
    assert (error.key, error.expected, error.remedy) == ("optim.lr", "a\nnumber", "Set   it.")


@pytest.mark.parametrize("found", ["no connection", "no connection.", "no connection.."])
def test_what_another_library_says_ends_with_one_full_stop(found):
    assert (
        str(UserError("path", "a model", found, "Check it."))
        == "path: expected a model, found no connection. Check it."
    )


def test_run_error_is_not_a_mistake_of_the_user():
    assert issubclass(RunError, RuntimeError)
    assert not issubclass(RunError, UserError)


@pytest.mark.parametrize(("word", "said"), [
    ("tok", "Did you mean 'token'?"), ("TOKEN", "Did you mean 'token'?"), ("zzz", "Known: hybrid, sequence, token."),
    ("", "Known: hybrid, sequence, token."),
])  # fmt: skip
def test_suggest_names_the_nearest_or_all(word, said):
    assert suggest(word, ["token", "sequence", "hybrid"]) == said


def test_choose():
    choose("key", "a", iter(["a", "b"]))
    with pytest.raises(UserError, match=r"^key: expected one of alpha, beta, found 'alpa'. Did you mean 'alpha'\?$"):
        choose("key", "alpa", iter(["alpha", "beta"]))


def test_gather_tells_every_mistake_once_and_runs_every_check():
    def fail(key):
        raise UserError(key, "a", "b", "C.")

    def fail_twice():
        gather(lambda: fail("two"), lambda: fail("three"))

    assert gather(lambda: 1, lambda: "x") == [1, "x"]
    with pytest.raises(UserError) as one:
        gather(lambda: fail("one"), lambda: 1, lambda: fail("one"))
    assert type(one.value) is UserError
    with pytest.raises(UserErrors) as more:
        gather(lambda: fail("one"), fail_twice, lambda: fail("two"))
    assert [mistake.key for mistake in more.value.mistakes] == ["one", "two", "three"]
    assert more.value.key == "one"
    assert str(more.value).count("\n") == 2
    with pytest.raises(ZeroDivisionError):
        gather(lambda: 1 / 0)
