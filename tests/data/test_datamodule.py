import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from lit_opd.config import DataConfig
from lit_opd.data.datamodule import PromptDataModule
from lit_opd.data.stream import PromptStream
from lit_opd.errors import UserError

PROMPTS = [f"p{i:02d}" for i in range(7)]
BATCH, EPOCHS = 2, 3
PER_EPOCH = len(PROMPTS) // BATCH
TOTAL = PER_EPOCH * EPOCHS


class Crash(Exception):
    pass


class Recorder(L.LightningModule):
    """Remembers what it was given; takes two optimizer steps a batch, so that steps and batches differ."""

    def __init__(self, tokenizer, crash_at=None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.crash_at = tokenizer, crash_at
        self.seen, self.validated = [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        if batch.draws[0][0] == self.crash_at:
            raise Crash
        self.seen.append((tuple(batch.draws), tuple(row["prompt"] for row in batch.rows)))
        for _ in range(2):
            self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.validated += [(draws, row["prompt"]) for draws, row in zip(batch.draws, batch.rows, strict=True)]

    test_step = validation_step


class SaveEverywhere(Callback):
    """A checkpoint at every place where one may be written."""

    def __init__(self, folder):
        self.folder, self.taken = folder, 0

    def save(self, trainer, place):
        trainer.save_checkpoint(self.folder / f"{place}-{self.taken}.ckpt")

    def on_train_batch_end(self, trainer, module, *_):
        self.taken += 1
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "epoch_end")

    def on_train_end(self, trainer, module):
        self.save(trainer, "train_end")


def data(**keys):
    keys = {"train_rows": PROMPTS, "validation_rows": PROMPTS[:3], "batch_size": BATCH, **keys}
    return PromptDataModule(**keys)


def trainer(*callbacks, **keys):
    # With none of our own, Lightning would write checkpoints into the current folder.
    checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    keys = {"max_epochs": EPOCHS, "callbacks": list(callbacks), "enable_checkpointing": checkpoints, **keys}
    return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **keys)


def fit(tokenizer, *callbacks, checkpoint=None, crash_at=None, module=None, **keys):
    recorder = Recorder(tokenizer, crash_at)
    try:
        trainer(*callbacks, **keys).fit(recorder, datamodule=module or data(), ckpt_path=checkpoint)
    except Crash:
        assert crash_at is not None
    return recorder.seen


LIMITS = {
    "epochs": {"max_epochs": EPOCHS},
    "steps": {"max_epochs": -1, "max_steps": 2 * TOTAL},
    "part of the epoch": {"max_epochs": EPOCHS, "limit_train_batches": 2},
    "validation every batch": {"max_epochs": EPOCHS, "val_check_interval": 1},
    "validation across epochs": {
        "max_epochs": -1,
        "max_steps": 2 * TOTAL,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    },
}


@pytest.fixture(params=LIMITS)
def limits(request):
    return LIMITS[request.param]


def test_training_follows_the_stream(tokenizer, limits):
    seen = fit(tokenizer, **limits)
    stream = PromptStream(len(PROMPTS), BATCH, seed=0)
    total = TOTAL if "limit_train_batches" not in limits else 2 * EPOCHS
    expected = [stream.batch(number) for number in range(total)]
    assert seen == [(tuple(d for _, d in batch), tuple(PROMPTS[row] for row, _ in batch)) for batch in expected]


def test_resuming_from_any_checkpoint_gives_the_tail(tokenizer, limits, tmp_path):
    whole = fit(tokenizer, SaveEverywhere(tmp_path), **limits)
    checkpoints = sorted(tmp_path.iterdir())
    assert {"batch_end", "epoch_end", "validation_end", "train_end"} <= {p.stem.split("-")[0] for p in checkpoints}
    for checkpoint in checkpoints:
        taken = int(checkpoint.stem.split("-")[1])
        assert fit(tokenizer, checkpoint=checkpoint, **limits) == whole[taken:], checkpoint.stem


@pytest.mark.parametrize("crash_at", [0, 1, 3, 5, 8])
def test_resuming_after_a_crash_repeats_only_the_batch_that_failed(tokenizer, limits, crash_at, tmp_path):
    whole = fit(tokenizer, **limits)
    crash_at = min(crash_at, len(whole) - 1)
    begun = fit(tokenizer, OnExceptionCheckpoint(tmp_path), crash_at=crash_at, **limits)
    rest = fit(tokenizer, checkpoint=tmp_path / "on_exception.ckpt", **limits)
    assert begun + rest == whole


def test_resuming_many_times(tokenizer, tmp_path):
    # In steps, as Lightning miscounts the batches of an epoch that is resumed twice, whatever the loader.
    limits = LIMITS["steps"]
    last = tmp_path / "on_exception.ckpt"
    whole = fit(tokenizer, **limits)
    seen = fit(tokenizer, OnExceptionCheckpoint(tmp_path), crash_at=1, **limits)
    for crash_at in (1, 2, 3, 5):
        seen += fit(tokenizer, OnExceptionCheckpoint(tmp_path), crash_at=crash_at, checkpoint=last, **limits)
    assert seen == whole[:5]
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    assert fit(tokenizer, saver, checkpoint=last, max_epochs=-1, max_steps=14) == whole[5:7]
    assert fit(tokenizer, checkpoint=tmp_path / "step=12.ckpt", **limits) == whole[6:]
    assert fit(tokenizer, checkpoint=tmp_path / "step=14.ckpt", **limits) == whole[7:]


def test_a_new_run_with_the_same_data_begins_anew(tokenizer, tmp_path):
    module = data()
    whole = fit(tokenizer, SaveEverywhere(tmp_path), module=module)
    assert fit(tokenizer, checkpoint=tmp_path / "batch_end-4.ckpt", module=module) == whole[4:]
    assert fit(tokenizer, module=module) == whole


def test_lightning_does_not_call_the_loader_unable_to_resume(tokenizer, tmp_path):
    fit(tokenizer, SaveEverywhere(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not resumable|changed since).*")
        fit(tokenizer, checkpoint=tmp_path / "batch_end-4.ckpt")


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"seed": 1}, "seed"), ({"train_rows": PROMPTS[:6]}, "dataset_sha256"), ({"batch_size": 1}, "size")],
)
def test_resuming_with_another_sequence_warns(tokenizer, keys, named, tmp_path):
    fit(tokenizer, SaveEverywhere(tmp_path))
    with pytest.warns(UserWarning, match=f"{named} changed since the checkpoint"):
        fit(tokenizer, checkpoint=tmp_path / "batch_end-4.ckpt", module=data(**keys))


def test_resuming_with_a_template_that_holds_the_date_warns(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(chat=True)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    fit(tokenizer, SaveEverywhere(tmp_path), module=data(train_rows=rows, chat=True))
    tokenizer.chat_template = "[system]" + "2026-11-28" + tokenizer.chat_template
    with pytest.warns(UserWarning, match=r"^rendered_sha256 changed since the checkpoint"):
        fit(tokenizer, checkpoint=tmp_path / "batch_end-4.ckpt", module=data(train_rows=rows, chat=True))


def test_another_sequence_from_its_beginning_is_no_reason_to_warn(tokenizer, tmp_path):
    fit(tokenizer, SaveEverywhere(tmp_path))
    module = data(seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changed since.*")
        trainer().validate(Recorder(tokenizer), datamodule=module, ckpt_path=tmp_path / "batch_end-4.ckpt")
        assert len(fit(tokenizer, module=module)) == TOTAL


def test_state_without_a_trainer(tokenizer):
    module, resumed = data(tokenizer=tokenizer), data(tokenizer=tokenizer)
    loader = module.train_dataloader()
    whole = [batch.draws for _ in range(2) for batch in loader]
    resumed.load_state_dict({**module.state_dict(), "completed_batches": 2})
    assert [batch.draws for batch in resumed.train_dataloader()] == whole[2 : 2 + PER_EPOCH]
    assert resumed.state_dict()["completed_batches"] == 2


def test_batches(tokenizer):
    module = data(tokenizer=tokenizer, batch_size=3, train_rows=["a", "bcd", "ef"])
    (batch,) = module.train_dataloader()
    assert len(module.train_dataloader()) == 1
    for ids_P, mask_P, row in zip(batch.prompts.ids_BP, batch.prompts.mask_BP, batch.rows, strict=True):
        assert tokenizer.decode(ids_P[mask_P]) == row["prompt"]
    assert batch.prompts.ids_BP.shape == (3, 3)


def test_validation_comes_in_order_and_in_full(tokenizer):
    recorder = Recorder(tokenizer)
    expected = [((0, i), prompt) for i, prompt in enumerate(PROMPTS[:3])]
    module = data(seed=5, evaluation_batch_size=2)
    trainer().validate(recorder, datamodule=module)
    assert recorder.validated == expected
    trainer().test(recorder, datamodule=module)
    assert recorder.validated == expected * 2


def test_training_without_validation_rows(tokenizer):
    assert len(fit(tokenizer, module=data(validation_rows=None))) == TOTAL


def test_rows_may_hold_anything(tokenizer):
    @dataclass(frozen=True)
    class Answer:
        text: str

    answers = []
    module = data(train_rows=[{"prompt": p, "answer": Answer(p)} for p in PROMPTS])
    recorder = Recorder(tokenizer)
    recorder.on_train_batch_start = lambda batch, _: answers.extend(row["answer"] for row in batch.rows)
    trainer(max_epochs=1).fit(recorder, datamodule=module)
    assert {type(answer) for answer in answers} == {Answer}


TWO_PROCESSES = """
import json, sys
sys.path[:0] = {path!r}
from test_datamodule import Recorder, data, trainer
from transformers import PreTrainedTokenizerFast

class Reporter(Recorder):
    def on_fit_end(self):
        with open("{folder}/" + str(self.global_rank) + ".json", "w") as file:
            json.dump([self.seen, self.validated], file)

recorder = Reporter(PreTrainedTokenizerFast.from_pretrained("{folder}"))
run = trainer(strategy="ddp_fork", devices=2, max_epochs=1, num_sanity_val_steps=0)
run.fit(recorder, datamodule=data(batch_size=3, evaluation_batch_size=2))
"""


def two_processes(tokenizer, folder, python):
    """What each of two ranks saw; forked from a process of their own, as the threads of this one would not survive."""
    tokenizer.save_pretrained(folder)
    script = folder / "run.py"
    script.write_text(TWO_PROCESSES.format(path=[str(Path(__file__).parent), *sys.path], folder=folder))
    subprocess.run([python, str(script)], check=True, timeout=120)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_see_what_one_does(tokenizer, tmp_path, warm_python):
    (seen0, validated0), (seen1, validated1) = two_processes(tokenizer, tmp_path, warm_python)
    alone = Recorder(tokenizer)
    trainer(max_epochs=1, num_sanity_val_steps=0).fit(alone, datamodule=data(batch_size=3))
    for first, second, (draws, prompts) in zip(seen0, seen1, alone.seen, strict=True):
        assert [len(first[0]), len(second[0])] == [2, 1]
        pairs = [*zip(*first, strict=True), *zip(*second, strict=True)]
        assert sorted((tuple(d), p) for d, p in pairs) == sorted(zip(draws, prompts, strict=True))
    assert sorted((tuple(d), p) for d, p in validated0 + validated1) == alone.validated
    assert [len(validated0), len(validated1)] == [2, 1]


class Place:
    """The part of a trainer that says which process this is."""

    overfit_batches = 0

    def __init__(self, global_rank, world_size):
        self.global_rank, self.world_size = global_rank, world_size
        self.fit_loop = trainer().fit_loop


def test_validation_rows_are_shared_without_padding(tokenizer):
    shares = []
    for rank in range(2):
        module = data(tokenizer=tokenizer, validation_rows=PROMPTS, evaluation_batch_size=3)
        module.trainer = Place(rank, 2)
        shares.append([[row["prompt"] for row in batch.rows] for batch in module.val_dataloader()])
    assert shares == [[["p00", "p02", "p04"], ["p06"]], [["p01", "p03", "p05"]]]


def test_too_few_validation_rows_for_every_rank(tokenizer):
    module = data(tokenizer=tokenizer)
    module.trainer = Place(0, 4)
    with pytest.raises(UserError, match=r"data\.validation_size: expected at least one prompt for each of 4 processes"):
        module.setup("validate")


def test_keys_and_rows():
    module = PromptDataModule(DataConfig(batch_size=3), source="function", path="lit_opd.data.arithmetic:problems",
                              train_size=4, validation_size=2)  # fmt: skip
    assert module.config.batch_size == 3
    assert [len(rows) for rows in module.rows] == [4, 2]
    assert data(prompt_column="q").rows[0][0] == {"q": "p00"}


def test_the_configuration_given_is_left_alone():
    config = DataConfig()
    PromptDataModule(config, batch_size=3)
    assert config == DataConfig()


def test_verifier():
    assert data().verifier is None
    assert data(verifier=max).verifier.verify is max
    rows = [{"prompt": "1+1=", "answer": "2"}]
    module = PromptDataModule(verifier=None, train_rows=rows, answer_column="answer")
    assert module.verifier is None
    assert PromptDataModule(DataConfig(verifier="exact")).verifier("2", rows[0]) == 1.0


def test_hash_is_of_content(tokenizer):
    assert data().dataset_sha256 == data(tokenizer=tokenizer, batch_size=1).dataset_sha256
    hashes = {
        data(train_rows=train, validation_rows=validation).dataset_sha256
        for train, validation in [(["a", "b"], ["c"]), (["a"], ["b", "c"]), (["b", "a"], ["c"]), (["a", "b"], ["d"])]
    }
    assert len(hashes) == 4


def test_hashes_of_parts_are_of_their_content_alone(tokenizer):
    first, second = (data(train_rows=rows, validation_rows=["c"]).part_sha256 for rows in (["a", "b"], ["b", "a"]))
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert first[1] == data(train_rows=["c"], validation_rows=["a"]).part_sha256[0]


def test_counts(tokenizer):
    rows = {"train_rows": ["a", "bc", "defg"], "validation_rows": ["hijk", "l"]}
    drop = data(tokenizer=tokenizer, max_prompt_tokens=2, **rows).counts
    assert drop == {"train": 2, "dropped_train": 1, "truncated_train": 0,
                    "validation": 1, "dropped_validation": 1, "truncated_validation": 0}  # fmt: skip
    truncate = data(tokenizer=tokenizer, max_prompt_tokens=3, overlong="truncate", **rows).counts
    assert (truncate["train"], truncate["truncated_train"], truncate["truncated_validation"]) == (3, 1, 1)


def test_context_that_is_just_large_enough(tokenizer):
    data(tokenizer=tokenizer, context_length=10, max_new_tokens=7).setup()
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens.*longer than the context, of 3.*max_prompt_tokens=2"):
        data(tokenizer=tokenizer, context_length=10, max_new_tokens=8).setup()
    with pytest.raises(
        UserError, match=r"at most 0 tokens \(context 10 - 12 new\).*of 3\. Lower rollout\.max_new_tokens\.$"
    ):
        data(tokenizer=tokenizer, context_length=10, max_new_tokens=12).setup()


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({"batchsize": 1}, "data.batchsize", "Did you mean 'batch_size'"),
        ({"batch_size": 0}, "data.batch_size", "at least 1"),
        ({"overlong": "dropp"}, "data.overlong", "Did you mean 'drop'"),
        ({"prompt_template": "Answer:"}, "data.prompt_template", "a column in braces"),  # one prompt for all rows
        ({"system_prompt": "None"}, "data.system_prompt", "nothing is null"),
        ({"verifier_seconds": 0}, "data.verifier_seconds", "above 0, or null for no limit"),
        ({"on_verifier_error": "skip"}, "data.on_verifier_error", "stop, zero"),
        ({"last_assistant_turn": "keep"}, "data.last_assistant_turn", "refuse, drop, continue"),
        ({"train_rows": [{"q": "a"}]}, "data.prompt_column", "row 0 of train_rows with columns q"),
        ({"validation_rows": []}, "data.path", "none in validation_rows"),
        ({"verifier": None, "batch_size": 8}, "data.batch_size", "at most the 7"),
    ],
)
def test_mistakes(keys, key, says, tokenizer):
    with pytest.raises(UserError) as error:
        data(tokenizer=tokenizer, **keys).setup("fit")
    assert error.value.key == key
    assert says in str(error.value)


def test_no_tokenizer():
    with pytest.raises(UserError, match="tokenizer: expected one to encode prompts with"):
        data().setup()


def test_overfit_batches_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"trainer\.overfit_batches.*data\.train_size=2"):
        fit(tokenizer, overfit_batches=1)


def test_sources_are_imported_without_torch():
    code = "import sys, lit_opd.data.arithmetic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
