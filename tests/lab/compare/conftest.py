"""A comparison to write down: two variants of the shipped pair, few steps, in a workspace of its own."""

from pathlib import Path

import pytest
import yaml

from lit_opd.lab.compare.grid import load_comparison, runs_of

QUICKSTART = Path(__file__).parents[3] / "conf" / "quickstart.yaml"
OVERRIDES = (
    "trainer.max_steps=40", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "data.train_size=24",
    "data.validation_size=6", "data.batch_size=4", "rollout.max_new_tokens=8", "optim.warmup_steps=2",
    "evaluation.every_n_steps=10", "evaluation.num_examples=1", "evaluation.num_completions=2",
    "evaluation.pass_at=[1,2]", "evaluation.teacher=false", "tracking.system_metrics=false",
)  # fmt: skip


@pytest.fixture(scope="session")
def write_comparison():
    """Writes a comparison's file into a workspace; keys replace those of a small one."""

    def write(workspace, **keys):
        text = {
            "base": [str(QUICKSTART)], "overrides": [*OVERRIDES], "variants": ["token", "full_vocab"], "seeds": [0],
            "output_dir": str(workspace.folder / "out"), "tracking": {"uri": workspace.uri, "experiment": "tests"},
        } | keys  # fmt: skip
        file = workspace.folder / "compare.yaml"
        file.write_text(yaml.safe_dump(text, sort_keys=False))
        return file

    return write


@pytest.fixture
def make_comparison(workspace, write_comparison):
    """Loads a comparison and its runs."""

    def make(**keys):
        comparison = load_comparison([write_comparison(workspace, **keys)])
        return comparison, runs_of(comparison)

    return make
