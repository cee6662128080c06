"""Causal language models of transformers are right or refused, and the page of docs/ says which is which."""

from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architectures.md").read_text()
ROWS = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
VERDICTS = {kind.strip("` "): word.strip() for _, kind, word, *_ in ROWS}
# Families that are distilled today, some with other attention, experts or recurrences.
RIGHT = [
    "deepseek_v3", "deepseek_v4", "falcon_h1", "gemma3_text", "gemma4_text", "glm4", "glm4_moe", "glm_moe_dsa",
    "gpt_oss", "granite", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "llama", "llama4_text", "mamba",
    "mamba2", "mimo_v2_flash", "minimax", "minimax_m2", "mistral", "olmo2", "olmo3", "olmo_hybrid", "qwen3",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "smollm3",
]  # fmt: skip
# Positions counted by column, no cache, a cache that does not hold what the forward pass computes, another head.
REFUSED = ["bart", "bert", "moshi", "nemotron_h", "rembert", "rwkv", "xlnet", "zamba2"]


@pytest.fixture(scope="module")
def census():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from tools import census

        yield census


@pytest.mark.parametrize(("kind", "word"), [(k, "right") for k in RIGHT] + [(k, "refused") for k in REFUSED])
def test_an_architecture_is_right_or_refused(census, kind, word):
    """Here a few kinds of each; `python -m tools.census` tries all."""
    found = census.try_out(kind)
    same = f"transformers {transformers.__version__}:" in PAGE  # with another release, any refusal may come or go
    assert found.word == word if same else found.word != "wrong", found.said
    assert VERDICTS[kind] == word


def test_no_architecture_is_wrong():
    assert set(VERDICTS.values()) == {"right", "refused", "not built"}
