"""The registry as tables: all of it, by family, and as Markdown understands it."""

import re

import pytest

from lit_opd import estimators
from lit_opd.cli import main
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
    (row,) = [row for row in sections(markdown_table())["sequence"] if row.startswith("| `sequence` ")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    spec = estimators.get("sequence")
    assert cells == ["`sequence`", "sequence", "sequence_reverse_kl", "yes", "token", spec.summary, spec.source]


def test_bars_are_escaped_in_markdown(odd):
    (row,) = [row for row in sections(markdown_table())["sequence"] if odd in row]
    assert r"[B] of KL(student \|\| teacher)." in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 8  # seven cells


def test_markdown_table_is_what_the_command_prints(capsys):
    assert main(["estimators", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown_table() + "\n"


def test_terminal_table_is_readable_at_a_hundred_columns(odd, capsys):
    assert main(["estimators"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert all(re.search(rf"^  {name}  ", out, re.MULTILINE) for name in estimators.names())
    assert [re.search(rf"^{family}: ", out, re.MULTILINE).start() for family in ("token", "sequence", "hybrid")]
    assert "[B]" in out
    assert "[me]" in out
    assert "needs token+rewards+groups" in out
