"""A stand-in for a vLLM server that scores, with the faults that a real one may have."""

import math
import random

import torch
from rollout.vllm_servers import StandIn


class TeacherStandIn(StandIn):
    """Answers as `vllm serve` does to who scores. Attributes say how it misbehaves.

    Attributes:
        first: answers that come before any other, to requests that score.
        most: the largest number of most probable tokens that it gives.
        prefix: tokens that it puts before every prompt.
        shift: positions that its scores are off by.
        off_by: nats by which scores are off, but not what it writes.
        obeys: whether the temperature of a request reaches its scores.
        noise: the largest deviation of a score, in nats.
        even: whether all tokens are equally probable.
        bad: what stands in the place of a log-probability.
        context: the longest sequence that it takes.
    """

    def __init__(self, model, tokenizer, names=("teacher",)):
        super().__init__(model)
        self.tokenizer, self.names, self.first, self.most = tokenizer, names, [], 20
        self.prefix, self.shift, self.off_by, self.obeys, self.noise = [], 0, 0.0, False, 0.0
        self.even, self.bad, self.random, self.bodies = False, None, random.Random(0), []
        self.context = model.config.max_position_embeddings

    def answer(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": name, "max_model_len": self.context} for name in self.names]}
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        if self.first:
            return self.first.pop(0)
        self.bodies.append(body)
        return super().answer(path, body)

    @torch.no_grad()
    def complete(self, body):
        ids = self.prefix + body["prompt"]
        top = body["prompt_logprobs"]
        if top > self.most:
            return 400, {"error": {"message": f"Requested prompt logprobs of {top}, which is greater than {self.most}"}}
        logps = self.logps(ids, body["temperature"] if self.obeys else 1.0)
        entries = [None, *(self.entry(logps[i], ids, i + 1, top) for i in range(len(ids) - 1))]
        written, recorded = [], []
        for _ in range(body["max_tokens"]):
            found = self.logps(ids + written, 1.0)[-1]
            written.append(int(found.argmax()))
            recorded.append(float(found.max()))
        choice = {"token_ids": written, "logprobs": {"token_logprobs": recorded}, "prompt_logprobs": entries}
        return 200, {"choices": [choice]}

    def logps(self, ids, temperature):
        logits = self.model(input_ids=torch.tensor([ids])).logits[0].float()
        return (logits * (not self.even) / temperature).log_softmax(-1)

    def entry(self, logps_V, ids, position, top):
        taken = ids[min(max(position + self.shift, 0), len(ids) - 1)]
        table = {
            index: float(logps_V[index]) for index in [taken, *logps_V.topk(min(top, len(logps_V))).indices.tolist()]
        }
        table[taken] += self.off_by + self.random.uniform(-self.noise, 0)
        if self.bad is not None:
            table[taken] = self.bad
        return {str(index): {"logprob": value} for index, value in table.items()}


NAN = math.nan
