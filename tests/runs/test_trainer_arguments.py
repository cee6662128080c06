"""Every argument of Lightning's trainer works under `trainer:`, or is refused in one line."""

import inspect

import lightning as L
import pytest
import torch

from lit_opd.config import load_config
from lit_opd.errors import UserError
from lit_opd.runs.folder import RunFolder
from lit_opd.runs.lightning_trainer import OWN_TRAINER_KEYS, build_trainer
from lit_opd.runs.torch_settings import settled

ARGUMENTS = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
# A value that is no default, and what the trainer that takes it has.
TAKEN = {
    "accelerator": ("cpu", lambda t: t.strategy.root_device.type == "cpu"),
    "strategy": ("ddp", lambda t: type(t.strategy).__name__ == "DDPStrategy"),
    "devices": ("2", lambda t: t.world_size == 2), "num_nodes": ("2", lambda t: t.num_nodes == 2),
    "precision": ("bf16-mixed", lambda t: t.precision == "bf16-mixed"),
    "max_epochs": ("3", lambda t: t.max_epochs == 3), "min_epochs": ("2", lambda t: t.min_epochs == 2),
    "max_steps": ("7", lambda t: t.max_steps == 7), "min_steps": ("2", lambda t: t.min_steps == 2),
    "max_time": ("{minutes: 5}", lambda t: any("Timer" in type(c).__name__ for c in t.callbacks)),
    "limit_train_batches": ("3", lambda t: t.limit_train_batches == 3),
    "limit_val_batches": ("0.5", lambda t: t.limit_val_batches == 0.5),
    "limit_test_batches": ("2", lambda t: t.limit_test_batches == 2),
    "num_sanity_val_steps": ("0", lambda t: t.num_sanity_val_steps == 0),
    "log_every_n_steps": ("4", lambda t: t.log_every_n_steps == 4),
    "enable_progress_bar": ("false", lambda t: t.progress_bar_callback is None),
    "enable_model_summary": ("true", lambda t: any("Summary" in type(c).__name__ for c in t.callbacks)),
    "deterministic": ("warn", lambda t: torch.is_deterministic_algorithms_warn_only_enabled()),
    "benchmark": ("true", lambda t: torch.backends.cudnn.benchmark),
    "inference_mode": ("false", lambda t: t.validate_loop.inference_mode is False),
    "profiler": ("simple", lambda t: type(t.profiler).__name__ == "SimpleProfiler"),
    "detect_anomaly": ("true", lambda t: t._detect_anomaly is True),
    "reload_dataloaders_every_n_epochs": ("1", lambda t: t.reload_dataloaders_every_n_epochs == 1),
    "enable_autolog_hparams": ("false", lambda t: t.enable_autolog_hparams is False),
}  # fmt: skip


def test_every_argument_has_its_side():
    assert sorted([*TAKEN, *OWN_TRAINER_KEYS]) == sorted(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_is_taken_or_refused(name, tmp_path):
    value, holds = TAKEN.get(name, ("1", None))
    words = ["student.path=a", "teacher.path=b", "trainer.accelerator=cpu", f"trainer.{name}={value}"]
    config, folder = load_config([], words), RunFolder(tmp_path)
    if holds is not None:
        with settled(config):  # or the choices of one stay for all other tests
            assert holds(build_trainer(config, folder))
        return
    with pytest.raises(UserError, match=rf"^trainer\.{name}: expected to be left out: .* found 1\. \S.*\.$") as raised:
        build_trainer(config, folder)
    assert "\n" not in str(raised.value)
