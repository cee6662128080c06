"""Tiny models and a tokenizer of one token a character, shared by all tests; no network, no downloads."""

import copy
import os
import sys
from dataclasses import dataclass, field

import lightning as L
import pytest
import torch
import warm
import wide_norm  # noqa: F401  (takes effect on import)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workspaces import database, make_workspace, scratch, workspace  # noqa: F401  (one database for all tests)

from lit_opd import DistillationModule, PromptDataModule, errors, estimators
from lit_opd.estimators import registry
from lit_opd.measures import custom
from lit_opd.measures.table import MEASURES
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.types import Estimate, PromptBatch, Prompts, SamplingLaw

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = "0123456789+=-"
INTERPRET = os.environ.get("TRITON_INTERPRET")  # read before `tests/conftest.py` takes it away
PROMPTS = ["1+2=", "7=", "12-9+3=", "5+5=", "80-1="]


@pytest.fixture
def interpreted(monkeypatch):
    """Lets kernels run where there is no accelerator, interpreted, as `tests/conftest.py` had them made."""
    if INTERPRET is not None:
        monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)


@pytest.fixture(scope="session")
def make_tiny_tokenizer():
    """Makes a tokenizer whose ids are those of `SPECIAL`, then of the given characters."""

    def make(characters=CHARACTERS):
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *characters])}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        backend.decoder = decoders.Fuse()
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
        return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(make_tiny_tokenizer):
    return make_tiny_tokenizer()


@pytest.fixture
def spelling():
    """Makes a tokenizer over one vocabulary that has the pair `12`, and writes it whole or in two."""

    def make(whole):
        tokens = [*SPECIAL, *CHARACTERS, "12"]
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("12|." if whole else "."), "isolated")
        backend.decoder = decoders.Fuse()
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), tokens, strict=False))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    return make


@pytest.fixture(scope="session")
def make_model():
    """Makes a random Llama. Weights are large, so that next-token distributions are far from uniform."""

    def make(seed=0, dtype=torch.float32, **config):
        sizes = {"vocab_size": len(SPECIAL) + len(CHARACTERS), "hidden_size": 16, "intermediate_size": 24,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                 "max_position_embeddings": 64, "initializer_range": 0.5, "tie_word_embeddings": False,
                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(sizes | config))).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def save_model(tmp_path_factory, tiny_tokenizer):
    """Writes a model and a tokenizer to a new folder; returns its path."""

    def save(model, tokenizer=None):
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        (tokenizer or tiny_tokenizer).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def student_path(make_model, save_model):
    return save_model(make_model(seed=1))


@pytest.fixture(scope="session")
def teacher_path(make_model, save_model):
    return save_model(make_model(seed=2, hidden_size=24))


@pytest.fixture(scope="session")
def make_batch(tiny_tokenizer):
    """Makes a left-padded batch; every prompt's draws are named by its text, wherever it stands."""

    def make(prompts=tuple(PROMPTS), extra_padding=0):
        ids = [tiny_tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        width = max(map(len, ids)) + extra_padding
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ids])
        places = [PROMPTS.index(p) if p in PROMPTS else 99 for p in prompts]
        return PromptBatch(Prompts(padded, mask), [{"prompt": p, "answer": "1"} for p in prompts], 0, places)

    return make


@pytest.fixture(scope="session")
def sample(tiny_tokenizer):
    """Samples with the local engine from a bare model."""

    def run(model, batch, law, num_completions=1, length=10, seed=0):
        numbers = uniforms((seed, 0), batch.draws, num_completions, length)
        policy = LanguageModel(model, tiny_tokenizer, "student")
        return LocalEngine().sample(policy, batch, law, num_completions, numbers)

    return run


@pytest.fixture(scope="session")
def full_logits():
    """The model's own logits at every completion position, by one plain forward pass: [B, T, V]."""

    def run(model, rollout):
        ids = torch.cat([rollout.prompts.ids_BP, rollout.ids_BT], dim=1)
        mask = torch.cat([rollout.prompts.mask_BP, rollout.real_BT], dim=1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        return logits[:, rollout.prompts.ids_BP.shape[1] - 1 : -1]

    return run


@pytest.fixture(scope="module")
def two_models(make_model, tiny_tokenizer, make_batch, sample, full_logits):
    """Student, teacher, a rollout with holes in its mask, and both models' log-probabilities at counted positions."""
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64, hidden_size=24)
    rollout = sample(student, make_batch(), SamplingLaw(), num_completions=2)
    rollout = rollout.uncount(rollout.ids_BT == 7)
    logps = [full_logits(m, rollout).detach().log_softmax(-1)[rollout.mask_BT] for m in (student, teacher)]
    policies = [LanguageModel(m, tiny_tokenizer, k) for m, k in ((student, "student"), (teacher, "teacher"))]
    return *policies, rollout, *logps


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory):
    """A folder that all workers of this run of the tests have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def warm_python(of_all_workers):
    """A `python` whose programs find the slow libraries imported."""
    with warm.shared_server(of_all_workers / "warm") as folder:
        yield folder / "python"


@pytest.fixture(autouse=True)
def forget():
    """What a test registers or keeps secret is forgotten after it, with its files: another test may use the name."""
    kept = [(held, dict(held)) for held in (registry._REGISTRY, custom._REGISTERED, MEASURES, errors._SECRETS)]
    yield
    if all(held == before for held, before in kept):
        return
    for held, before in kept:
        held.clear()
        held.update(before)
    for name in [name for name in sys.modules if name.startswith("lit_opd_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def against_reference():
    """An estimator that asks for a reference: the sampled reverse KL to it, and no teacher."""

    @estimators.register_estimator("against_reference", needs="token+reference")
    def against_reference(tokens):
        log_ratio = (tokens.student_logps_BT - tokens.reference_logps_BT).detach()
        return Estimate(log_ratio * tokens.student_logps_BT, log_ratio)

    return estimators.build("against_reference")


@dataclass
class Record(L.Callback):
    """What a training run did: rollouts, and weights and gradients just before each optimizer step."""

    rollouts: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    gradients: list = field(default_factory=list)
    metrics: list = field(default_factory=list)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = [(n, p) for n, p in pl_module.model.named_parameters() if p.requires_grad]
        self.weights.append({n: p.detach().clone() for n, p in named})
        self.gradients.append({n: p.grad.clone() for n, p in named})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.metrics.append(copy.deepcopy(dict(trainer.callback_metrics)))


def longer_than_three(completion, row):
    return float(len(completion) > 3)


@pytest.fixture(scope="session")
def make_data(tiny_tokenizer):
    """Makes a data module of `PROMPTS`, with a verifier."""

    def make(prompts=tuple(PROMPTS), batch_size=None, **kwargs):
        rows = list(prompts)
        return PromptDataModule(tokenizer=tiny_tokenizer, train_rows=rows, validation_rows=rows,
                                verifier=longer_than_three, batch_size=batch_size or len(rows), **kwargs)  # fmt: skip

    return make


@pytest.fixture
def make_trainer(tmp_path):
    """Makes a silent one-process trainer."""

    def make(max_steps=1, **kwargs):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                 "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}  # fmt: skip
        base = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "use_distributed_sampler": False}
        return L.Trainer(max_steps=max_steps, **(quiet | base | kwargs))

    return make


@pytest.fixture
def make_module(tiny_tokenizer, monkeypatch):
    """Makes a module around models in memory: plain SGD, no clipping, six new tokens, two completions a prompt.

    Without the linter: what a step does is to be right for configurations that it refuses, too.
    """
    monkeypatch.setattr("lit_opd.linter.linting.lint", lambda *_: [])

    def make(student, teacher, estimator="full_vocab", **kwargs):
        optim = {"name": "SGD", "lr": 0.1, "clip_norm": None} | kwargs.pop("optim", {})
        rollout = {"max_new_tokens": 6, "num_completions": 2} | kwargs.pop("rollout", {})
        return DistillationModule(student, teacher, estimator, tokenizer=tiny_tokenizer, optim=optim, rollout=rollout,
                                  **kwargs)  # fmt: skip

    return make


@pytest.fixture
def fit(make_trainer, make_data):
    """Trains a module and returns the `Record` of it."""

    def run(module, steps=1, data=None, ckpt_path=None, **trainer):
        record, inner = Record(), module.engine.sample

        def recording_sample(*args):
            record.rollouts.append(inner(*args))
            return record.rollouts[-1]

        module.engine.sample = recording_sample
        callbacks = [record, *trainer.pop("callbacks", [])]
        make_trainer(steps, callbacks=callbacks, **trainer).fit(
            module, data or make_data(), ckpt_path=ckpt_path, weights_only=True
        )
        return record

    return run


@pytest.fixture
def write(tmp_path):
    """Writes a text to a new file, and returns its path."""

    def make(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return make
