"""Bring the models of a run together, and check that they fit before any weight loads.

A model is given as a path, a section of the configuration or a module in memory. The training module, which `measure`
and `audit` use too, gets its models from a `Pair`.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_opd.config import FrozenConfig, StudentConfig, TeacherConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.models.adapters import check_adapters
from lit_opd.models.dropout import set_dropout
from lit_opd.models.followed import FollowedStudent
from lit_opd.models.language_model import LanguageModel
from lit_opd.models.loading import load_frozen, load_student, load_tokenizer, read_model_config, refuse_quantised
from lit_opd.models.stops import read_stop_ids
from lit_opd.models.vocabulary import check_rows, extra_of, shared_vocabulary
from lit_opd.types import Need

__all__ = ["Pair"]

Student = str | StudentConfig | nn.Module
Teacher = str | TeacherConfig | nn.Module
Reference = str | FrozenConfig | nn.Module | None


class Pair:
    """A student, ready to train, and the frozen models that load when they are first asked for.

    Args:
        student: a path or hub name, a section of the configuration, or a model in memory.
        teacher: given in one of these ways, or a section of kind `student`; None where it is no model in this process.
            Several by name, of which those that are one.
        estimator: says whether a reference is needed, and how many tokens are compared at a position.
        tokenizer: the student's; needed for a model in memory, else read from its folder.
        teacher_tokenizer: the teacher's; for a model in memory by default the student's.
        reference: given as the teacher is; None, or a section without a path, is the student as it is now.

    Raises:
        UserError: a folder that cannot be read, tokenizers or vocabularies that do not fit, K above the vocabulary.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | Mapping[str, Teacher] | None,
        estimator: BoundEstimator,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        reference: Reference = None,
    ) -> None:
        student = StudentConfig(path=student) if isinstance(student, str) else student
        frozen: dict[str, Any] = {}
        teachers = _by_key(teacher)
        itself: dict[str, Any] = {}
        for key, one in teachers.items():
            kind = isinstance(one, TeacherConfig) and one.kind
            (itself if kind == "student" else frozen)[key] = TeacherConfig(path=one) if isinstance(one, str) else one
        if Need.REFERENCE in estimator.needs:
            frozen["reference"] = _as_reference(reference, student)
        _check_sections({"student": student} | frozen)
        tokenizer = _tokenizer_of(student, "student", tokenizer)
        own = {key: tokenizer for key, model in frozen.items() if _has_tokenizer_of(student, model)}
        if teacher_tokenizer is not None:
            own |= dict.fromkeys(teachers, teacher_tokenizer)
        self._frozen = {key: (model, _tokenizer_of(model, key, own.get(key))) for key, model in frozen.items()}
        rows = _vocabulary_rows(student, "student")
        self.vocabulary = _shared_by_all(tokenizer, rows, self._frozen)
        size = estimator.largest_support
        if size > self.vocabulary:
            raise UserError("estimator.kwargs.k", f"at most the vocabulary ({self.vocabulary})", size, "Lower it.")
        self.student = _as_student(student, tokenizer)
        self.student.vocabulary = self.vocabulary
        self._loaded: dict[str, LanguageModel] = {}
        for key, section in itself.items():
            section.check(key)
            self._loaded[key] = FollowedStudent(self.student, section)

    def read(self) -> None:
        """Read the weights of the frozen models, so that what is wrong with them shows before a run writes anything."""
        for key in self._frozen:
            (self.lend if key.startswith("teachers.") else self.load)(key, torch.device("cpu"))

    def load(self, key: str, device: torch.device) -> LanguageModel:
        """Return the frozen `teacher` or `reference` on a device, reading its weights at the first call."""
        if key not in self._loaded:
            self._loaded[key] = _as_frozen(*self._frozen[key], key)
            if not _has_own_tokens(self._frozen[key][0]):
                self._loaded[key].vocabulary = self.vocabulary
        return self._loaded[key].to(device)

    def lend(self, key: str, device: torch.device) -> LanguageModel:
        """Return one of several teachers on a device, and let go of the one that was lent before.

        At most one of those that are read from a folder is in memory, and it is read again when it is lent again. What
        has `offload` stays in main memory, and leaves the device when it is not `present`.
        """
        for other in [other for other in self._loaded if other != key and self._is_lent(other)]:
            gone = weakref.ref(self._loaded.pop(other).model)
            if gone() is not None:  # its code made a model that holds itself, which only Python's search finds
                gc.collect()
        return self.load(key, device)

    def _is_lent(self, key: str) -> bool:
        section = self._frozen.get(key, (None, None))[0]
        return key.startswith("teachers.") and isinstance(section, TeacherConfig) and not section.offload

    def stop_ids(self, key: str) -> list[int]:
        """List the tokens that end a completion of the `teacher` or the `reference`, before its weights load.

        Raises:
            UserError: the model is not in this process.
        """
        if key in self._loaded:
            return self._loaded[key].stop_ids
        if key not in self._frozen:
            expected, remedy = f"groups of tokens, for the stop tokens of this {key} are not known", "Name them."
            raise UserError("estimator.merged_stops", expected, "auto", remedy)
        model, tokenizer = self._frozen[key]
        if isinstance(model, nn.Module):
            return LanguageModel(model, tokenizer, key).stop_ids
        stops = read_stop_ids(model, tokenizer, read_model_config(model, key))
        return [index for index in stops if index < self.vocabulary]

    @property
    def followed(self) -> FollowedStudent | None:
        """The teacher that is the student itself, or None."""
        return next((model for model in self._loaded.values() if isinstance(model, FollowedStudent)), None)

    def names(self) -> dict[str, str]:
        """Name the models, and the teacher's quantisation, for a run's tags."""
        own = self.student.causal_lm.config._name_or_path or type(self.student.model).__name__
        frozen = {key: _name_of(model) for key, (model, _) in self._frozen.items()}
        teacher, _ = self._frozen.get("teacher", (None, None))
        quantization = teacher.quantization if isinstance(teacher, TeacherConfig) else "none"
        return {"student": own, **frozen, "teacher_quantization": quantization}


def _by_key(teacher: Teacher | Mapping[str, Teacher] | None) -> dict[str, Teacher]:
    if isinstance(teacher, Mapping):
        return {f"teachers.{name}": one for name, one in teacher.items()}
    return {} if teacher is None else {"teacher": teacher}


def _as_reference(reference: Reference, student: StudentConfig | nn.Module) -> TeacherConfig | nn.Module:
    section = FrozenConfig(path=reference) if isinstance(reference, str | None) else reference
    if isinstance(section, nn.Module):
        return section
    keys = dict(vars(section))
    if section.path is None:
        if isinstance(student, nn.Module):
            return copy.deepcopy(student)  # copied now, before a resumed run loads its checkpoint into the student
        keys |= {key: getattr(student, key) for key in ("path", "gguf_file", "trust_remote_code")}
    return TeacherConfig(**keys)


def _check_sections(models: dict[str, Any]) -> None:
    for key, model in models.items():
        if not isinstance(model, nn.Module):
            model.check(key)
    given = {key: model for key, model in models.items() if isinstance(model, nn.Module)}
    mine = {id(p) for p in given["student"].parameters()} if "student" in given else set()
    for key, model in given.items():
        # Freezing it would freeze the student, and training the student would move it.
        if key != "student" and any(id(p) in mine for p in model.parameters()):
            found = "one that shares weights with the student"
            raise UserError(key, "a model of its own", found, "Pass copy.deepcopy(model).")


def _name_of(model: Any) -> str:
    if isinstance(model, TeacherConfig):
        return model.path
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _has_tokenizer_of(student: Any, model: Any) -> bool:
    # A model in memory has no folder to read a tokenizer from, and the student's own folder was read already.
    if isinstance(model, nn.Module) or isinstance(student, nn.Module):
        return isinstance(model, nn.Module)
    return (model.path, model.gguf_file) == (student.path, student.gguf_file)


def _has_own_tokens(model: Any) -> bool:
    """Tell whether a teacher's vocabulary need not be the student's, for it is compared by spans of text."""
    return getattr(model, "least_aligned", None) is not None


def _tokenizer_of(model: Any, key: str, tokenizer: Any) -> Any:
    if tokenizer is not None:
        return tokenizer
    if isinstance(model, nn.Module):
        raise UserError("tokenizer", f"the tokenizer of the {key}, a model in memory", "none", "Pass tokenizer=...")
    return load_tokenizer(model, key)


def _vocabulary_rows(model: Any, key: str) -> int:
    if isinstance(model, nn.Module):
        return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    return int(read_model_config(model, key).get_text_config().vocab_size)


def _shared_by_all(tokenizer: Any, rows: int, frozen: Mapping[str, tuple[Any, Any]]) -> int:
    """Count the ids that the student shares with all models that are compared with it id by id."""
    shared = [rows]
    for key, (model, other) in frozen.items():
        if _has_own_tokens(model):
            check_rows(other, _vocabulary_rows(model, key), key)
        else:
            extra = _tell_extra(model, tokenizer, other)
            shared.append(shared_vocabulary(tokenizer, other, rows, _vocabulary_rows(model, key), key, extra))
    return min(shared)


def _tell_extra(model: Any, tokenizer: Any, other: Any) -> str:
    """Read what becomes of a teacher's extra tokens, and tell which are masked."""
    choice = getattr(model, "extra_tokens", "refuse")
    extra = extra_of(tokenizer, other)
    if choice == "mask" and extra:
        told = f"{len(extra)} of the teacher's tokens, from {extra[min(extra)]!r} (id {min(extra)}) on"
        fate = "are not the student's. Neither model writes them, nor gives them probability."
        warnings.warn(f"teacher.extra_tokens: {told}, {fate}", LintWarning, stacklevel=4)
    return choice


def _as_student(student: Any, tokenizer: Any) -> LanguageModel:
    if isinstance(student, StudentConfig):
        loaded = load_student(student, tokenizer)
    else:
        refuse_quantised(student.config, "student")
        if hasattr(student, "peft_config"):
            check_adapters(student)
        loaded = LanguageModel(student, tokenizer, "student")
        loaded.check_head()
    # Lightning keeps the mode that it finds.
    set_dropout(loaded.model, isinstance(student, StudentConfig) and student.dropout == "keep")
    return loaded


def _as_frozen(model: Any, tokenizer: Any, key: str) -> LanguageModel:
    if isinstance(model, TeacherConfig):
        return load_frozen(model, tokenizer, key)
    return LanguageModel(model, tokenizer, key, own_precision=True).freeze()
