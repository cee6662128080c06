"""Have a server prove that it is the teacher it is taken for, before a run and while it trains.

A served teacher is known by its answers only. Another tokenizer, positions off by one or weights lost in a restart give
numbers that look like scores, and a gradient that is wrong. `ServedScorer` calls `meet` once, and looks at its canary
every so many rollouts.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from lit_opd.config import TeacherConfig
from lit_opd.errors import LintWarning, UserError, choose
from lit_opd.teachers.prompt_logprobs import Row, ask_for, read_row
from lit_opd.teachers.replicas import LOOK, Refusal, Replicas

__all__ = ["Meeting", "check_canary", "check_noise", "meet"]

_log = logging.getLogger(__name__)

KEY = "teacher.server"
TEXT = (
    "In 1687 Newton wrote: F = m * a. Was it true? Ja, größtenteils; 是的。 def f(x):\n    return [x ** 2, None]\n"
    "The answer is 42, because 6 x 7 = 42, and 3 x 4 = 12 does not."
)
LONGEST, COPIES, WRITTEN = 64, 8, 4  # tokens of the probe, times that it is sent at once, tokens to be written
CHUNK = 4096  # tokens of the vocabulary whose text is asked for at once
NOISE = 0.1  # nats, root of the mean square: in bf16 0.01 to 0.05 was seen
TOLD = 0.1  # of the gap: from here on noise adds a hundredth or more to the variance of the log-ratio
EVEN = 1e-3  # nats: what log-probabilities of a trained model differ by at least
QUIETER = "Serve it with a fixed batch-invariant kernel, or in another dtype."
OTHER_TOKENS = "Serve a teacher whose tokenizer is the student's, id by id."


@dataclass(frozen=True)
class Meeting:
    """Hold what was found when a server was met.

    Attributes:
        model: its name there.
        context: the longest sequence that it takes, of all servers; None where none says.
        probe: the sequence that was scored.
        logps: its log-probabilities, from the second token on.
        noise: how far two answers about one sequence are apart, in nats (root of the mean square).
    """

    model: str
    context: int | None
    probe: list[int]
    logps: list[float]
    noise: float


def meet(replicas: Replicas, config: TeacherConfig, tokenizer: Any) -> Meeting:
    """Ask every server for its model, its tokens and the scores of a probe, and compare.

    Args:
        replicas: the servers.
        config: the section of the teacher.
        tokenizer: the student's.

    Raises:
        UserError: a server is not the teacher that it is taken for.
    """
    found = [_meet_one(replicas, address, config, tokenizer) for address in replicas.addresses]
    first = found[0]
    for address, other in zip(replicas.addresses, found, strict=True):
        if (apart := _apart(first.logps, other.logps)) > NOISE:
            expected = f"servers of one model, equal to {NOISE} nats"
            told = f"{address}, which is {apart:.2g} nats from {replicas.addresses[0]}"
            raise UserError(KEY, expected, told, "Serve the same folder everywhere.")
    known = [one.context for one in found if one.context is not None]
    return Meeting(first.model, min(known, default=None), first.probe, first.logps, max(one.noise for one in found))


def check_canary(replicas: Replicas, meeting: Meeting) -> None:
    """Compare what every server says of the probe now with what was said at first.

    Raises:
        UserError: other weights answer.
    """
    for address in replicas.addresses:
        (answer,) = replicas.ask_all([ask_for(meeting.probe, 0, meeting.model)], address)
        now = read_row(answer, meeting.probe, 1, 0).logps
        if (apart := _apart(meeting.logps, now)) > NOISE:
            expected = f"the weights that the run began with, equal to {NOISE} nats"
            remedy = "Serve the same folder again, and go on with --resume auto."
            raise UserError(KEY, expected, f"others at {address}, {apart:.2g} nats away", remedy)


def check_noise(noise: float, gap: float) -> None:
    """Relate the noise of a server's answers to what the student has to learn from them.

    Args:
        noise: how far two answers about one sequence are apart, in nats (root of the mean square).
        gap: how far student and teacher are apart, in nats (mean absolute log-ratio of sampled tokens).

    Raises:
        UserError: the noise is larger, so that most of a token's log-ratio would be rounding.
    """
    found = f"answers about one sequence that are {noise:.2g} nats apart, where student and teacher are {gap:.2g}"
    _log.info("%s: %s.", KEY, found)
    if noise > gap:
        raise UserError(KEY, "less noise than there is to learn", found, QUIETER)
    if noise > TOLD * gap:
        warnings.warn(f"{KEY}: {found}. {QUIETER}", LintWarning, stacklevel=2)


def _meet_one(replicas: Replicas, address: str, config: TeacherConfig, tokenizer: Any) -> Meeting:
    model, context = _model(replicas, address, config.model)
    _check_tokens(replicas, address, model, tokenizer)
    probe, top = _probe(tokenizer), min(config.top_k, len(tokenizer.get_vocab()))
    try:
        row = _score(replicas, address, model, probe, top)
    except Refusal as refusal:
        raise _explained(refusal, top) from refusal
    if max(row.logps) - min(row.logps) < EVEN:
        found = f"{row.logps[0]:.3f} nats for every token of it"
        raise UserError(KEY, "a trained model's log-probabilities of a text", found, "Load the weights again.")
    noise = max(_apart(row.logps, r.logps) for r in _score_copies(replicas, address, model, probe))
    if noise > NOISE:
        expected = f"one sequence scored alike each time, to {NOISE} nats"
        raise UserError(KEY, expected, f"{noise:.2g} nats between answers", QUIETER)
    _check_plain(replicas, address, model, probe, row)
    _check_positions(replicas, address, model, probe)
    return Meeting(model, context, probe, row.logps, noise)


def _model(replicas: Replicas, address: str, wanted: str | None) -> tuple[str, int | None]:
    """Find the served model by its name, and the longest sequence it takes."""
    served = {one["id"]: one for one in replicas.ask("/v1/models", address=address).get("data", [])}
    if wanted is None and len(served) != 1:
        raise UserError("teacher.model", "the name of one of several models", "null", f"Known: {', '.join(served)}.")
    name = wanted or next(iter(served))
    choose("teacher.model", name, served)
    return name, served[name].get("max_model_len")


def _check_tokens(replicas: Replicas, address: str, model: str, tokenizer: Any) -> None:
    """Compare the text of every token, and the tokens of a text, with the student's tokenizer."""
    expected = "the student's tokenizer, id by id"
    every = sorted(tokenizer.get_vocab().values())
    for ids in (every[start : start + CHUNK] for start in range(0, len(every), CHUNK)):
        theirs, own = _text(replicas, address, model, ids), tokenizer.decode(list(ids))
        if theirs == own:
            continue
        number = next((i for i in ids if _text(replicas, address, model, [i]) != tokenizer.decode([i])), ids[0])
        other = _text(replicas, address, model, [number])
        found = f"id {number} is {tokenizer.decode([number])!r} for the student and {other!r} for the teacher"
        found += f" (checksums {_checksum(own)} and {_checksum(theirs or '')})"
        raise UserError(KEY, expected, found, OTHER_TOKENS)
    asked = {"model": model, "prompt": TEXT, "add_special_tokens": False}
    theirs = replicas.ask("/tokenize", asked, address)["tokens"]
    own = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if theirs != own:
        at = next((i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), min(len(theirs), len(own)))
        found = f"another split of a text from token {at} on: {own[at : at + 4]} and {theirs[at : at + 4]}"
        raise UserError(KEY, expected, found, OTHER_TOKENS)


def _text(replicas: Replicas, address: str, model: str, ids: Sequence[int]) -> str | None:
    """Ask for the text of tokens, None where the server has no such token."""
    try:
        return replicas.ask("/detokenize", {"model": model, "tokens": list(ids)}, address)["prompt"]
    except Refusal:
        return None


def _checksum(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]


def _probe(tokenizer: Any) -> list[int]:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:LONGEST]
    # A tokenizer of a few words has none of these.
    return ids if len(set(ids)) >= COPIES else sorted(tokenizer.get_vocab().values())[:LONGEST]


def _score(replicas: Replicas, address: str, model: str, ids: Sequence[int], top: int, **settings: Any) -> Row:
    path, body = ask_for(ids, top, model, **settings)
    return read_row(replicas.ask(path, body, address), ids, 1, top)


def _score_copies(replicas: Replicas, address: str, model: str, probe: Sequence[int]) -> list[Row]:
    """Score the probe several times at once, among shorter sequences."""
    sequences = [probe[: len(probe) - cut] for cut in range(COPIES) for _ in (0, 1)]
    answers = replicas.ask_all([ask_for(ids, 0, model) for ids in sequences], address)
    return [read_row(answer, ids, 1, 0) for answer, ids in zip(answers, sequences, strict=True)]


def _check_plain(replicas: Replicas, address: str, model: str, probe: Sequence[int], row: Row) -> None:
    """Check that no setting of a sampler reaches the log-probabilities."""
    for name, value in {"temperature": 0.25, "repetition_penalty": 1.9, "presence_penalty": 1.9}.items():
        bent = _score(replicas, address, model, probe, 0, **{name: value})
        if (apart := _apart(row.logps, bent.logps)) > NOISE:
            expected = "log-probabilities of the model's own distribution"
            remedy = "Start the server with --logprobs-mode raw_logprobs."
            raise UserError(KEY, expected, f"others by {apart:.2g} nats with {name}={value:g}", remedy)


def _check_positions(replicas: Replicas, address: str, model: str, probe: Sequence[int]) -> None:
    """Compare the log-probabilities of tokens that the server writes with those it gives them when it scores."""
    wanted = {"max_tokens": WRITTEN, "logprobs": 0, "return_token_ids": True, "ignore_eos": True, "seed": 0}
    path, body = ask_for(probe, 0, model, **wanted)
    choice = replicas.ask(path, body, address)["choices"][0]
    ids, written = choice.get("token_ids") or [], (choice.get("logprobs") or {}).get("token_logprobs") or []
    sequence = [*probe, *ids]
    path, body = ask_for(sequence, 0, model)
    scored = read_row(replicas.ask(path, body, address), sequence, len(probe), 0).logps
    if len(written) != WRITTEN or (apart := _apart(written, scored)) > NOISE:
        expected = "a token that the server writes to be as probable when it scores it"
        found = f"{apart:.2g} nats between them" if len(written) == WRITTEN else f"{len(written)} tokens written"
        raise UserError(KEY, expected, found, f"Its positions are off. {LOOK}")


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Measure the root of the mean square of the difference, over the positions that both have."""
    pairs = list(zip(one, other, strict=False))
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / max(len(pairs), 1))


def _explained(refusal: Refusal, top_k: int) -> UserError:
    """Name the key of what a server refused."""
    words = str(refusal.found)
    if "logprobs" in words:
        remedy = f"Start the server with --max-logprobs {top_k}, or lower teacher.top_k."
        return UserError("teacher.top_k", "no more than the server gives", f"{top_k} ({words})", remedy)
    return refusal
