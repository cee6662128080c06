"""What can be known of a run before any weights load, where it depends on the estimator."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lit_opd.config import PACKAGE_FOLDER, load_config
from lit_opd.errors import UserError
from lit_opd.runs import train
from lit_opd.runs.prepare import prepare_data

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
SMALL = ("data.train_size=8", "data.validation_size=2", "data.batch_size=4")
GROUPS = ("estimator.name=leave_one_out", "rollout.num_completions=3", "lint.allow=[stale_updates]")
REFERENCE = ("estimator.name=against_reference",)


def prepare(*words):
    return prepare_data(load_config([QUICKSTART], [*SMALL, *words]))


@pytest.fixture
def other_teacher(tmp_path):
    """A copy of the teacher with a shorter context."""
    folder = tmp_path / "reference"
    shutil.copytree(PACKAGE_FOLDER / "tiny" / "teacher", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 24}))
    return folder


def test_every_update_gets_a_prompt_where_completions_stay_together():
    message = (r"optim\.updates_per_rollout: expected at most data\.batch_size \(4\): 'leave_one_out' keeps the "
               r"completions of a prompt together, found 5\. Lower it or raise data\.batch_size\.")  # fmt: skip
    with pytest.raises(UserError, match=message):
        prepare(*GROUPS, "optim.updates_per_rollout=5")
    assert prepare(*GROUPS, "optim.updates_per_rollout=4")
    assert prepare("optim.updates_per_rollout=5", "rollout.num_completions=3", "lint.allow=[stale_updates]")


@pytest.mark.usefixtures("against_reference")
def test_a_reference_is_looked_at_like_the_teacher(other_teacher):
    with pytest.raises(UserError, match=r"reference\.path: .*no folder '/nowhere'"):
        prepare(*REFERENCE, "reference.path=/nowhere")
    # The context length of quickstart's pair holds prompt and completion; that of this reference does not.
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens: .*context"):
        prepare(*REFERENCE, f"reference.path={other_teacher}")
    (other_teacher / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"reference\.path: expected a model folder with weights"):
        prepare(*REFERENCE, f"reference.path={other_teacher}")
    assert prepare(*REFERENCE)
    assert prepare("estimator.name=token", "reference.path=/nowhere"), "looked at, and not needed"


def test_weights_are_read_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(PACKAGE_FOLDER / "tiny" / "teacher")
    model.lm_head.weight.data[3, 4] = float("nan")
    shutil.copytree(PACKAGE_FOLDER / "tiny" / "teacher", "teacher")
    model.save_pretrained("teacher")
    words = [*SMALL, "teacher.path=./teacher", "output_dir=run", "tracking.uri=sqlite:///mlflow.db"]
    with pytest.raises(
        UserError, match=r"teacher\.path: expected finite weights in float32, found others in .*embed_tok"
    ):
        train(load_config([QUICKSTART], words))
    assert not (tmp_path / "run").exists()


def test_demonstrations_come_from_somewhere_known():
    with pytest.raises(UserError, match=r"rollout\.demonstrations: expected one of teacher, data, found 'web'"):
        prepare("rollout.demonstrations=web")
    with pytest.raises(UserError, match=r"rollout\.student_share: expected a value in \[0, 1\], found 1\.5"):
        prepare("rollout.student_share=1.5")
