"""Let the student be its own teacher: with the weights it had, with those it has, or without its adapters.

Such a teacher knows more only by the prompt that it reads (`teacher.prompt`). It is the student's own module, into
which other weights are swapped while it scores, so that it costs a copy of the weights that train. `Pair` makes one
where `teacher.kind` is `student`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_opd.config import TeacherConfig
from lit_opd.errors import UserError
from lit_opd.functional import Head
from lit_opd.models.language_model import LanguageModel

__all__ = ["FollowedStudent"]


class FollowedStudent(LanguageModel):
    """A student whose weights of another time are in place while it is `present`.

    Args:
        student: as it is now, before it trains.
        config: the section of the teacher, with `follow` and its number.

    Attributes:
        weights: by name, what is swapped in; empty for `live` and `adapter_off`.

    Raises:
        UserError: `teacher.follow=adapter_off` for a student without adapters.
    """

    def __init__(self, student: LanguageModel, config: TeacherConfig) -> None:
        super().__init__(student.model, student.tokenizer, "teacher", temperature=config.temperature)
        if config.follow == "adapter_off" and not hasattr(student.model, "disable_adapter"):
            expected = "a student with adapters (student.lora)"
            raise UserError("teacher.follow", expected, "adapter_off", "Set it to initial.")
        self.vocabulary, self.followed = student.vocabulary, config
        self.weights = {} if config.follow in ("live", "adapter_off") else self._trained()
        self._inside = False

    def check_updates(self, updates: int) -> None:
        """Refuse several updates on one rollout where the first of them would move what scored it.

        Raises:
            UserError: `teacher.follow=live` with more than one.
        """
        if self.followed.follow == "live" and updates > 1:
            expected = "1 with teacher.follow=live, whose scores would be of weights that have moved"
            raise UserError("optim.updates_per_rollout", expected, updates, "Set it, or teacher.follow=every.")

    def _trained(self) -> dict[str, Tensor]:
        parameters = self.model.named_parameters()
        return {name: p.detach().clone() for name, p in parameters if p.requires_grad}

    @property
    def head(self) -> Head:
        """The output layer as it is now, which later swaps do not reach."""
        return super().head.detach()

    def to(self, device: torch.device) -> LanguageModel:
        """Leave the module where the student is."""
        return self

    def freeze(self) -> LanguageModel:
        """Leave the module as it is: it trains."""
        return self

    @contextmanager
    def present(self) -> Iterator[None]:
        """Put the teacher's weights in place, and the student's back afterwards."""
        if self._inside:
            yield
            return
        off = self.model.disable_adapter if self.followed.follow == "adapter_off" else nullcontext
        self._inside = True
        self._swap()
        try:
            with off():  # type: ignore[operator]
                yield
        finally:
            self._swap()
            self._inside = False

    def _swap(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.weights:
                if isinstance(parameter, DTensor):
                    expected = "live or adapter_off with sharded weights, which cannot be swapped"
                    raise UserError("teacher.follow", expected, self.followed.follow, "Use DDP, or set it.")
                kept = self.weights[name].to(parameter.device)
                self.weights[name], parameter.data = parameter.data, kept
        torch.clear_autocast_cache()  # torch casts a parameter once and knows nothing of a swap

    @torch.no_grad()
    def learned(self, step: int) -> None:
        """Follow the student after an optimizer step, the `step`-th of the run.

        Weights are made anew and not moved in place: scores of the rollout hold the head that they were made with.
        """
        config = self.followed
        if config.follow == "every" and step % config.follow_every == 0:
            self.weights = self._trained()
        elif config.follow == "ema":
            now = dict(self.model.named_parameters())
            self.weights = {n: w.to(now[n].device).lerp(now[n], config.follow_rate) for n, w in self.weights.items()}

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint has to hold: weights that neither the student's folder nor the student has."""
        return dict(self.weights) if self.followed.follow in ("ema", "every") else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take the weights of a checkpoint."""
        if self.followed.follow in ("ema", "every"):
            self.weights = dict(state)
