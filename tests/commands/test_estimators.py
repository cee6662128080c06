"""The registry as tables: all of it, by family, and as Markdown understands it."""

import re

import pytest

from lit_opd import estimators
from lit_opd.cli import main
from lit_opd.commands.describing import keywords_of
from lit_opd.commands.estimators import markdown_table


@pytest.fixture
def odd():
    """A registry that also holds an estimator whose docstring has a bar in it, and brackets."""

    @estimators.register_estimator("odd_bars", family="sequence", needs="token+rewards+groups", source="[me]")
    def fn(tokens):
        """[B] of KL(student || teacher)."""

    return "odd_bars"


def sections(table):
    parts = re.split(r"^### (\w+): .*$", table, flags=re.MULTILINE)[1:]
    return {
        family: [line for line in text.splitlines() if line.startswith("| `")]
        for family, text in zip(parts[::2], parts[1::2], strict=True)
    }


def test_families_come_in_order_and_hold_every_estimator_once():
    found = sections(markdown_table())
    assert list(found) == ["token", "sequence", "hybrid"]
    for family, rows in found.items():
        names = [row.split("`")[1] for row in rows]
        assert names == [name for name in estimators.names() if estimators.get(name).family == family]


def test_rows_say_what_the_contract_says():
    (row,) = [row for row in sections(markdown_table())["sequence"] if row.startswith("| `reopold` ")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    spec, keywords = estimators.get("reopold"), "`mixture=0.2`, `entropy_share=1.0`"
    assert cells == ["`reopold`", "sequence", "reverse_kl", "no", "token+entropy", keywords, spec.summary, spec.source]


def test_bars_are_escaped_in_markdown(odd):
    (row,) = [row for row in sections(markdown_table())["sequence"] if odd in row]
    assert r"[B] of KL(student \|\| teacher)." in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 9  # eight cells


def test_markdown_table_is_what_the_command_prints(capsys):
    assert main(["estimators", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown_table() + "\n"


def test_every_keyword_has_type_default_and_meaning():
    found = {name: keywords_of(estimators.get(name)) for name in estimators.names() if ":" not in name}
    assert {name: [k.name for k in found[name]] for name in found} == {n: [*estimators.get(n).defaults] for n in found}
    assert [f"{name} {k.name}" for name in found for k in found[name] if k.type == "-" or not k.meaning] == []
    assert [f"{name} {k.name}" for name in found for k in found[name] if not k.default] == ["mix terms"]


def test_one_estimator_is_described(capsys):
    assert main(["estimators", "prefix_opd"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for line in (r"aims at   the gradient of reverse_kl, biased", r"horizon   int          100       h, or where it",
                 r"grow_to   int \| None   null      where h ends", r"base      str \| dict   token     the estimator",
                 r"formula     w_t = 1 at the first h", r"train with  estimator.name=prefix_opd estim"):  # fmt: skip
        assert re.search(rf"^  {line}", out, re.MULTILINE), out


def test_an_unknown_estimator_is_told_in_one_line(capsys):
    assert main(["estimators", "prefix_odp"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean 'prefix_opd'?\n")


def test_terminal_table_is_readable_at_a_hundred_columns(odd, capsys):
    assert main(["estimators"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert all(re.search(rf"^  {name}  ", out, re.MULTILINE) for name in estimators.names())
    assert [re.search(rf"^{family}: ", out, re.MULTILINE).start() for family in ("token", "sequence", "hybrid")]
    assert "[B]" in out
    assert "[me]" in out
    assert "needs token+rewards+groups" in out
