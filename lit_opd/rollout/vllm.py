r"""Sample with a vLLM server, for students that a GPU serves faster than this process decodes.

Start the server with the student's own folder, one server for each run, and leave it running:

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT_FOLDER --host 127.0.0.1 --port 8000 \
        --logprobs-mode processed_logprobs --dtype bfloat16 --max-model-len 4096

and train with `rollout.engine=vllm rollout.server=http://127.0.0.1:8000`. `--logprobs-mode processed_logprobs` makes
the recorded log-probabilities those of the sampling law. `VLLM_SERVER_DEV_MODE=1` opens the addresses through which
weights are replaced to everybody who reaches the port: keep it on 127.0.0.1. `--max-model-len` must hold prompt and
completion. With `--dtype bfloat16` the server rounds its logits: `rollout/sampler_gap` shows by how much, and
`--dtype float32` makes it smallest. Written for vLLM 0.32.

Weights. Before every rollout the server is asked which weights it holds. Where they are not the student's present ones,
these are written (LoRA merged into a copy, in the dtype served) to a temporary folder, loaded by the server, and its
caches dropped. So a server is mended that was restarted or given weights by another run. The server must see the
temporary folder under the same path: one machine, or a file system that both share, named by TMPDIR (TMPDIR=/dev/shm
keeps the weights in memory). The processes of a data-parallel run on one machine share the server; sharded models
(FSDP) cannot be pushed.

The law. Temperature 0, or from 0.01 to 2, top_k, top_p, min_p (not with top_p: vLLM cuts by min_p first) and
min_new_tokens mean what they mean to the local engine. Every row is drawn with a seed made from its `uniforms_BT`. The
same seeds give the same completions on one server, as far as its arithmetic does not depend on which requests it
batches together, but not those of the local engine.

Only the student is served. A teacher's demonstrations are sampled in this process.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_opd.errors import UserError
from lit_opd.functional import law_logps
from lit_opd.models import LanguageModel
from lit_opd.rollout.local import LocalEngine
from lit_opd.rollout.weights import WeightSync
from lit_opd.types import PromptBatch, Rollout, SamplingLaw

__all__ = ["VllmEngine"]

SECONDS = 1800  # the longest wait for one answer
CONNECTIONS = 512
PROBE = SamplingLaw(temperature=2.0)  # far from 1, so that log-probabilities of the unprocessed law stand out
PROBE_ROWS, PROBE_TOKENS = 4, 8
OPENER = build_opener(ProxyHandler({}))  # urllib would obey http_proxy; a server on our file system needs no proxy
START = "Start it: VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT_FOLDER --logprobs-mode processed_logprobs."
ALONE = "Start one server for each run."
SERVE_STUDENT = "Serve the student's own folder."
LOOK = "Look at what the server prints."


class _Refusal(UserError):
    """An error of a server that understood a request and declined it."""


class VllmEngine:
    """The engine that samples with a vLLM server, whose weights it keeps equal to the student's.

    Args:
        url: where the server listens, e.g. http://127.0.0.1:8000.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.dtype: torch.dtype | None = None  # that of the served weights; None until the server was asked
        self.local = LocalEngine()
        self.weights = WeightSync(self.url, self._label, self._load)

    def find(self) -> None:
        """Ask whether the server is there, before a run that needs it writes anything.

        Raises:
            UserError: no server, or one that is not in development mode.
        """
        self._label()

    @torch.no_grad()
    def sample(
        self, policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
    ) -> Rollout:
        """Complete every prompt, as `RolloutEngine.sample` says, with seeds made from `uniforms_BT`.

        Raises:
            UserError: no server, or one that refuses, serves another model, records log-probabilities of another law,
                or gets weights from another run meanwhile.
        """
        if policy.key != "student":
            return self.local.sample(policy, batch, law, num_completions, uniforms_BT)
        first = self.dtype is None
        if first:
            self.dtype = self._meet(policy)
        label = self.weights.push(policy.model, self.dtype)
        if first:
            self._check_law(policy, batch, uniforms_BT)
        rollout = self._complete(policy, batch, law, num_completions, uniforms_BT)
        if (found := self._label()) != label:
            raise UserError("rollout.server", "a server of this run alone", f"other weights on it ({found})", ALONE)
        return rollout

    def _meet(self, policy: LanguageModel) -> torch.dtype:
        """Check that the server's vocabulary is the student's, and return the dtype served."""
        info = self._call("/server_info?config_format=json")
        rows = _rows(policy)
        expected = f"a model with the student's vocabulary ({rows})"
        # vLLM does not tell the size of its vocabulary, but refuses a bias on a token that it does not have.
        body = {"prompt": [0], "max_tokens": 1}
        try:
            self._call("/v1/completions", body | {"logit_bias": {str(rows - 1): 0.0}})
        except _Refusal as error:
            raise UserError("rollout.server", expected, f"a smaller one ({error.found})", SERVE_STUDENT) from error
        with suppress(_Refusal):
            self._call("/v1/completions", body | {"logit_bias": {str(rows): 0.0}})
            raise UserError("rollout.server", expected, "a larger one", SERVE_STUDENT)
        try:
            return getattr(torch, info["vllm_config"]["model_config"]["dtype"].removeprefix("torch."))
        except KeyError as error:
            found = f"an answer without {error}"
            raise UserError("rollout.server", f"a vLLM server at {self.url}", found, START) from error

    def _load(self, folder: str, label: str) -> None:
        """Make the server load the weights of a folder, and drop its prefix cache."""
        self._call("/update_weight_version", {"new_version": "half replaced"})
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        # vLLM keeps keys and values of prompts, which the old weights computed.
        if not self._call("/reset_prefix_cache?reset_running_requests=true", {}).get("success"):
            raise UserError("rollout.server", "a prefix cache that can be dropped", "one in use", ALONE)
        self._call("/update_weight_version", {"new_version": label})

    def _label(self) -> str:
        return self._call("/weight_info")["weight_version"]

    def _check_law(self, policy: LanguageModel, batch: PromptBatch, uniforms_BT: Tensor) -> None:
        """Compare log-probabilities of a few tokens with the policy's own."""
        prompts = len(batch.rows)
        part = batch.take(torch.arange(min(prompts, PROBE_ROWS), device=uniforms_BT.device))
        seeds_BT = uniforms_BT[:: len(uniforms_BT) // prompts][:PROBE_ROWS, :PROBE_TOKENS]
        rollout = self._complete(policy, part._replace(ended=None), PROBE, 1, seeds_BT)
        found_N = rollout.sampler_logps_BT[rollout.mask_BT]
        errors = [float((found_N - _own_logps(policy, rollout, law)).abs().mean()) for law in (PROBE, SamplingLaw())]
        error, raw_error = errors
        if error > 0.01 and raw_error < error / 4:
            remedy = "Start the server with --logprobs-mode processed_logprobs."
            raise UserError("rollout.server", "log-probabilities of the sampling law", "those at temperature 1", remedy)
        if not error < 0.5:  # in bf16 a few hundredths
            found = f"others, off by {error:.2g} nats"
            raise UserError("rollout.server", "the student's log-probabilities", found, SERVE_STUDENT)

    def _complete(
        self, policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
    ) -> Rollout:
        (rows, length), device = uniforms_BT.shape, uniforms_BT.device
        settings = _settings(policy, law, length)
        prompts = [ids[mask].tolist() for ids, mask in zip(*batch.prompts, strict=True)]
        seeds_B = (uniforms_BT[:, 0] * 2**53).long().tolist()

        def complete(row: int) -> tuple[list[int], list[float]]:
            prompt = row // num_completions
            ids, logps = self._request(settings | {"prompt": prompts[prompt], "seed": seeds_B[row]})
            if batch.ended is not None:
                batch.ended(batch, prompt, ids)
            return ids, logps

        # One request for each row, for vLLM draws all prompts of a request with one seed.
        with ThreadPoolExecutor(min(rows, CONNECTIONS)) as pool:
            written = list(pool.map(complete, range(rows)))
        ids_BT = _padded([ids for ids, _ in written], policy.pad_id, torch.long).to(device)
        # With its dtype, for Lightning's bf16-true makes bf16 torch's default.
        logps_BT = _padded([logps for _, logps in written], 0.0, torch.float32).to(device)
        mask_BT = _padded([[True] * len(ids) for ids, _ in written], False, torch.bool).to(device)
        stopped_B = torch.tensor([ids[-1] in policy.stop_ids for ids, _ in written], device=device)
        kept_BT = logps_BT if law.temperature > 0 else torch.zeros_like(logps_BT)
        return Rollout.completed(batch, num_completions, ids_BT, mask_BT, kept_BT, stopped_B, law)

    def _request(self, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Fetch token ids and log-probabilities of one completion, of full length or ended by a stop token."""
        choice = self._call("/v1/completions", body)["choices"][0]
        ids, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or not logps or len(ids) != len(logps):
            raise UserError("rollout.server", "token ids with their log-probabilities", "none", "Use vLLM 0.32.")
        if len(ids) < body["max_tokens"] and ids[-1] not in body["stop_token_ids"]:
            expected = "completions up to a stop token or rollout.max_new_tokens"
            raise UserError("rollout.server", expected, f"one ended by {choice['finish_reason']!r}", LOOK)
        return ids, logps

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the server by GET, or by POST where there is a body, and return its answer."""
        data, asked = None if body is None else json.dumps(body).encode(), path.partition("?")[0]
        try:
            request = Request(self.url + path, data, {"Content-Type": "application/json"})
            with OPENER.open(request, timeout=SECONDS) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            if error.code == 404:
                expected = f"a vLLM server in development mode at {self.url}"
                raise UserError("rollout.server", expected, f"no {asked}", START) from error
            kind = _Refusal if error.code == 400 else UserError
            found = f"{error.code}: {_message(error)}"
            raise kind("rollout.server", f"an answer from {asked}", found, LOOK) from error
        except (OSError, HTTPException, ValueError) as error:
            raise UserError("rollout.server", f"a vLLM server at {self.url}", str(error), START) from error


def _settings(policy: LanguageModel, law: SamplingLaw, length: int) -> dict[str, Any]:
    """Make the part that all requests of a rollout share, naming every setting, so that no server default applies."""
    return {
        "max_tokens": length, "min_tokens": min(law.min_new_tokens, length), "temperature": law.temperature,
        "top_p": law.top_p, "top_k": law.top_k, "min_p": law.min_p, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "stop_token_ids": policy.stop_ids, "ignore_eos": True, "logprobs": 0,
        "return_token_ids": True, "logit_bias": {str(i): -100.0 for i in range(policy.vocabulary, _rows(policy))},
    }  # fmt: skip


def _rows(policy: LanguageModel) -> int:
    """Count the rows of the output layer, which may include tokens that are never sampled."""
    return len(policy.causal_lm.get_output_embeddings().weight)


def _padded(rows: list[list[Any]], filler: float, dtype: torch.dtype) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=filler)


def _message(error: HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _own_logps(policy: LanguageModel, rollout: Rollout, law: SamplingLaw) -> Tensor:
    """Compute log-probabilities [N] of the counted tokens by the model's own forward pass, row by row."""
    logps = []
    with policy.evaluating():
        for row in range(len(rollout)):
            one = rollout.rows(torch.tensor([row], device=rollout.mask_BT.device))
            ids_L, width = torch.cat([one.prompts.ids_BP[0], one.ids_BT[0]]), one.prompts.ids_BP.shape[1]
            logits_TV = policy.causal_lm(input_ids=ids_L[None]).logits[0, width - 1 : -1, : policy.vocabulary]
            logps.append(law_logps(logits_TV, law).gather(-1, one.ids_BT[0, :, None])[:, 0])
    return torch.cat(logps)
