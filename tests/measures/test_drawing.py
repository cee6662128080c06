"""The looks that all pictures share."""

import subprocess
import sys

import pytest

from lit_opd.measures.drawing import figure, look, plain, png, style


def test_seventy_things_look_different_and_colours_alone_tell_seven():
    assert len({(look(n)["color"], look(n)["marker"]) for n in range(70)}) == 70
    assert len({look(n)["color"] for n in range(7)}) == 7


def test_a_figure_becomes_a_png_of_its_size():
    with style():
        drawn = png(figure(2, 1), dpi=100)
    assert drawn.startswith(b"\x89PNG")
    assert (int.from_bytes(drawn[16:20]), int.from_bytes(drawn[20:24])) == (200, 100)


def test_the_style_ends_with_its_context():
    import matplotlib

    before = matplotlib.rcParams["axes.spines.top"]
    with style(size=7):
        assert (matplotlib.rcParams["axes.spines.top"], matplotlib.rcParams["font.size"]) == (False, 7)
    assert matplotlib.rcParams["axes.spines.top"] == before


@pytest.mark.parametrize("name", ["_hidden", "$x_1$", r"a$b"])
def test_a_name_is_drawn_as_it_is_written(name):
    with style():
        drawn = figure(4, 3)
        ax = drawn.subplots()
        ax.plot([0, 1], [0, 1], label=plain(name))
        assert png(drawn)
        assert [text.get_text().strip().replace("\\$", "$") for text in ax.legend().get_texts()] == [name]


def test_matplotlib_is_imported_only_when_something_is_drawn():
    script = "import sys, lit_opd.measures.drawing; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
