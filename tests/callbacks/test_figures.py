"""What an evaluation leaves to look at: the pictures' lines, the page's tokens, the numbers, and when."""

import io
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lit_opd.callbacks import pictures
from lit_opd.callbacks.figures import EvaluationFigures, to_json
from lit_opd.callbacks.page import BLUE, LEGEND, RED, completions_page, shade
from lit_opd.callbacks.pictures import draw_log_ratios, draw_positions
from lit_opd.evaluation import Example
from lit_opd.measures.histogram import LogRatioHistogram
from lit_opd.measures.positions import POSITION_VALUES, TokenProfile

TOKENS = ["Sun", "day", " <b>", "\n", "\t", "", "&amp;", "'q\"", "<|im_end|>"]
RATIOS = [0.0, 0.05, -0.2, 5.5, -7.0, 1.0, -1.0, 0.4, -0.00004]


@pytest.fixture
def profile(make_model, make_module, make_trainer, make_data):
    """Of an evaluation of the tiny models: five prompts, three completions each."""
    module = make_module(make_model(1), make_model(2), evaluation={"num_completions": 3, "max_new_tokens": 9})
    make_trainer(limit_val_batches=1.0).validate(module, make_data(), verbose=False)
    return module.evaluation.profile


@pytest.fixture
def figures(monkeypatch):
    """The figures themselves, kept as they are drawn."""
    kept, inner = [], pictures.png
    monkeypatch.setattr(pictures, "png", lambda figure, **how: kept.append(figure) or inner(figure, **how))
    return kept


def size(png):
    image = imread(io.BytesIO(png))
    assert image.std() > 0
    return image.shape[1]


def test_every_line_is_a_curve_with_its_band(profile, figures, monkeypatch):
    monkeypatch.setattr(pictures, "FEW_PROMPTS", 3)
    curves = profile.curves._replace(prompts=np.array([5, 5, 5, 4, 4, 3, 2, 2, 1]))
    assert size(draw_positions(curves, "student at step 7", 16)) == 900
    axes, sure = figures[0].axes, curves.prompts >= 3
    assert sorted(name for names in pictures.PANELS.values() for name in names) == sorted(curves.means)
    for ax, (heading, names) in zip(axes, pictures.PANELS.items(), strict=False):
        lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
        for name, line, faint, band in zip(names, lines[::2], lines[1::2], ax.collections, strict=True):
            assert line.get_xdata().tolist() == list(range(1, 10))
            np.testing.assert_array_equal(line.get_ydata()[sure], curves.means[name][sure])
            assert np.isnan(line.get_ydata()[~sure]).all()
            np.testing.assert_array_equal(faint.get_ydata()[~sure], curves.means[name][~sure])
            corners = np.concatenate([path.vertices for path in band.get_paths()])
            for table in (curves.lows, curves.highs):
                assert all(np.isclose(corners[:, 1], end).any() for end in table[name][sure & np.isfinite(table[name])])
            least, most = ax.get_ylim()
            assert least <= np.nanmin(curves.means[name]) <= np.nanmax(curves.means[name]) <= most
        assert ax.get_title(loc="left") == heading
    alive = axes[-1].patches[0].get_data().values
    assert alive.tolist() == curves.counts[curves.counts > 0].tolist()
    assert "student at step 7" in figures[0].get_suptitle()


def test_every_token_is_in_the_histogram_and_its_quantiles_are_marked(profile, figures):
    found = profile.log_ratios
    assert size(draw_log_ratios(found, "student at step 7")) == 900
    (ax,) = figures[0].axes
    below, above = (patch.get_data() for patch in ax.patches)
    assert below.values.sum() + above.values.sum() == found.counts.sum() > 50
    assert below.edges[-1] == above.edges[0] == 0
    assert below.values.sum() == found.counts[: len(found.counts) // 2].sum()
    marks = [line.get_xdata()[0] for line in ax.lines]
    assert marks == pytest.approx([found.quantile(share) for share in pictures.QUANTILES])
    assert ax.get_yscale() == "log"
    text = figures[0].get_suptitle()
    assert f"{found.counts.sum()} tokens" in text
    assert f"hold {found.top_share():.0%} of its sum" in text


def test_tokens_beyond_the_bins_are_told(figures):
    metric = LogRatioHistogram()
    metric.update(torch.tensor([-500.0, 0.5, 200.0, 300.0]))
    draw_log_ratios(metric.compute(), "x")
    assert "3 beyond ±100" in figures[0].get_suptitle()


@pytest.mark.parametrize("length", [1, 2, 5000])
def test_whatever_was_measured_can_be_drawn(length, figures, recwarn):
    """One position, long completions, no stop token, a single prompt, equal models, nothing at all."""
    profile = TokenProfile(length)
    mask = torch.ones(2, length, dtype=torch.bool)
    values = {name: torch.zeros(2, length) for name in POSITION_VALUES}
    values["stop_log_ratio"][:] = math.nan
    profile.curves.update(values, mask, torch.zeros(2, dtype=torch.long))
    profile.log_ratios.update(values["log_ratio"][mask])
    found = profile.compute()
    assert size(draw_positions(found.curves, "x", 16)) == size(draw_log_ratios(found.log_ratios, "x")) == 900
    assert "not measured" in [text.get_text() for text in figures[0].axes[6].texts]
    assert len(found.curves.counts) <= 128
    assert not [warning for warning in recwarn if "matplotlib" in warning.filename]
    nothing = TokenProfile(length).compute()
    assert size(draw_positions(nothing.curves, "x", 16)) == size(draw_log_ratios(nothing.log_ratios, "x")) == 900
    json.dumps(to_json(*nothing), allow_nan=False)


def test_the_numbers_are_those_of_the_pictures(profile):
    found = json.loads(json.dumps(to_json(*profile), allow_nan=False))
    curves, log_ratios = profile
    assert found["starts"] == list(range(10))
    assert found["tokens"] == curves.counts.tolist()
    assert found["prompts"] == curves.prompts.tolist()
    for name, tables in found["values"].items():
        for key, table in (("mean", curves.means), ("low", curves.lows), ("high", curves.highs)):
            read = np.array([math.nan if x is None else x for x in tables[key]])
            expected = np.where(np.isfinite(table[name]), table[name], math.nan)
            np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-12)
    assert sum(found["log_ratios"]["counts"]) == log_ratios.counts.sum()
    assert found["log_ratios"]["quantiles"]["0.5"] == pytest.approx(log_ratios.quantile(0.5), rel=1e-5)
    assert found["log_ratios"]["top_1_percent_share"] == pytest.approx(log_ratios.top_share(), rel=1e-5)


class Page(HTMLParser):
    """Every element's attributes and text, and whether all that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])
        if tag != "meta":
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2] += data

    def all(self, tag, **attrs):
        return [(a, text) for t, a, text in self.found if t == tag and attrs.items() <= a.items()]


def test_the_page_shows_every_token_with_its_log_ratio():
    examples = [Example("1 < 2 & <bos>", "", 0.5, TOKENS, RATIOS), Example("no verifier", "", None, ["x"], [2.0])]
    page = Page(completions_page(examples, "Completions: <student>"))
    tokens = [(a, text) for a, text in page.all("span") if "title" in a]
    shown = [*TOKENS[:3], "⏎\n", "⇥\t", "∅", *TOKENS[6:], "x"]
    assert [text for _, text in tokens] == shown
    values = [float(a["title"].removesuffix(" nats")) for a, _ in tokens]
    assert values == pytest.approx([*RATIOS, 2.0], abs=5e-4)
    assert tokens[8][0]["title"] == "+0.000 nats"
    assert [a["style"] for a, _ in tokens] == [shade(ratio) for ratio in [*RATIOS, 2.0]]
    assert [text for _, text in page.all("pre", **{"class": "quiet"})] == ["1 < 2 & <bos>", "no verifier"]
    heads = [text for _, text in page.all("div")]
    assert "reward 0.5 · 9 tokens" in heads[0]
    assert "reward" not in heads[1]
    assert page.all("h1")[0][1] == "Completions: <student>"


def test_the_page_needs_no_other_file_and_runs_nothing():
    text = completions_page([Example("<script>alert(1)</script>", "", 1.0, ["<img src=x>"], [1.0])], "x")
    page = Page(text)
    assert not page.all("script") + page.all("img") + page.all("link")
    assert "http" not in text
    assert "url(" not in text
    assert "color-scheme: light dark" in text


def test_a_page_of_no_completion_says_so():
    assert "evaluation.num_examples" in completions_page([], "x")


def test_shades_grow_with_the_log_ratio_and_the_legend_tells_them():
    values = np.linspace(0, 6, 400)
    strengths = [float(shade(x).rpartition(", ")[2].rstrip(")")) for x in values]
    assert strengths == sorted(strengths)
    assert (strengths[0], strengths[-1]) == (0, 0.8)
    assert shade(5.0) == shade(80.0)
    assert all(RED in shade(x) and shade(-x) == shade(x).replace(RED, BLUE) for x in values[1:])
    legend = Page(completions_page([], "x")).all("span")
    assert [(a["style"], float(text)) for a, text in legend] == [(shade(value), value) for value in LEGEND]


def test_without_mlflow_nothing_is_drawn(make_model, make_module, make_trainer, make_data, monkeypatch):
    monkeypatch.setattr("lit_opd.callbacks.figures.draw_positions", lambda *_: pytest.fail("drawn"))
    module = make_module(make_model(1), make_model(2))
    make_trainer(callbacks=[EvaluationFigures()], limit_val_batches=1.0).validate(module, make_data(), verbose=False)
