"""Parts of a user's own, each named in one place of the configuration: they run, and nothing else has to be told."""

import json

import pytest

from lit_opd.cli import main

MINE = '''
from pathlib import Path

from lightning import Callback

from lit_opd.rollout import LocalEngine


class Counting:
    """Samples as the local engine does, and keeps count."""

    def __init__(self, rollout):
        self.inner, self.completions = LocalEngine(), rollout.num_completions

    def sample(self, policy, batch, law, num_completions, uniforms_BT):
        with Path("engine.txt").open("a") as file:
            print(self.completions, num_completions, file=file)
        return self.inner.sample(policy, batch, law, num_completions, uniforms_BT)


class Notes(Callback):
    def __init__(self, word="step"):
        self.word = word

    def on_train_batch_end(self, trainer, module, *_):
        with Path("notes.txt").open("a") as file:
            print(self.word, trainer.global_step, file=file)


def differences(*, split, size, seed, largest=9):
    """Rows of a user's own: subtractions instead of additions."""
    pairs = [(a, b) for a in range(largest) for b in range(a)][:: 1 if split == "train" else -1]
    return [{"prompt": f"{a}+{b}=", "answer": str(a - b)} for a, b in pairs[:size]]
'''
# A place each; what is a word of the command line here is a line of YAML otherwise.
ENGINE = "rollout.engine=mine.py:Counting"
CALLBACKS = "callbacks=[mine.py:Notes,{path: mine.py:Notes,kwargs: {word: again}}]"
DATA = ("data.path=mine.py:differences", "data.kwargs={largest: 12}")


@pytest.fixture
def parts(workspace):
    (workspace.folder / "mine.py").write_text(MINE)
    return workspace


def test_an_engine_a_callback_and_a_data_source_of_a_users_own_train(parts):
    few = ("trainer.max_steps=2", "evaluation.every_n_steps=2", "evaluation.teacher=false", "diagnostics.figures=false")
    assert main(parts.arguments("fit", *few, ENGINE, CALLBACKS, *DATA)) == 0
    assert (parts.folder / "notes.txt").read_text().split("\n")[:-1] == ["step 1", "again 1", "step 2", "again 2"]
    assert set((parts.folder / "engine.txt").read_text().split("\n")[:-1]) == {"2 2"}
    assert json.loads((parts.output / "summary.json").read_text())["steps"] == 2
    (run,) = parts.runs
    assert run.data.params["rollout.engine"] == "mine.py:Counting"
