"""Student and teacher as a pair: what they are given as, and whether they fit, checked before any weight loads."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_opd.config import StudentConfig, TeacherConfig
from lit_opd.errors import UserError
from lit_opd.models.language_model import LanguageModel
from lit_opd.models.loading import load_student, load_teacher, load_tokenizer, read_model_config
from lit_opd.models.vocabulary import shared_vocabulary

__all__ = ["Pair"]

Student = str | StudentConfig | nn.Module
Teacher = str | TeacherConfig | nn.Module


class Pair:
    """A student, ready to train, and a teacher that loads when a device is known.

    Args:
        student: a path or hub name, a section of the configuration, or a model in memory.
        teacher: the same.
        tokenizer: the student's; needed for a model in memory, else read from its folder.
        teacher_tokenizer: the teacher's; for a model in memory by default the student's.
        support_size: K of the estimator, 0 where it compares no support.

    Raises:
        UserError: a folder that cannot be read, tokenizers or vocabularies that do not fit, K above the vocabulary.
    """

    def __init__(
        self, student: Student, teacher: Teacher, tokenizer: Any, teacher_tokenizer: Any, support_size: int
    ) -> None:
        student = StudentConfig(path=student) if isinstance(student, str) else student
        teacher = TeacherConfig(path=teacher) if isinstance(teacher, str) else teacher
        tokenizer = _tokenizer_of(student, tokenizer, "student")
        teacher_tokenizer = _tokenizer_of(teacher, teacher_tokenizer or _default(teacher, tokenizer), "teacher")
        rows = [_vocabulary_rows(model, key) for model, key in ((student, "student"), (teacher, "teacher"))]
        self.vocabulary = shared_vocabulary(tokenizer, teacher_tokenizer, *rows)
        if support_size > self.vocabulary:
            raise UserError(
                "estimator.kwargs.k", f"at most the vocabulary ({self.vocabulary})", support_size, "Lower it."
            )
        _check_apart(student, teacher)
        self._teacher, self._teacher_tokenizer = teacher, teacher_tokenizer
        self.student = _as_student(student, tokenizer)
        self.student.vocabulary = self.vocabulary

    def load_teacher(self) -> LanguageModel:
        """The frozen teacher; reads its weights where it was given as a path."""
        if isinstance(self._teacher, TeacherConfig):
            teacher = load_teacher(self._teacher, self._teacher_tokenizer)
        else:
            teacher = LanguageModel(self._teacher, self._teacher_tokenizer, "teacher", own_precision=True)
            teacher.model.requires_grad_(False).eval()
            teacher.check_head()
        teacher.vocabulary = self.vocabulary
        return teacher

    def names(self) -> dict[str, str]:
        """What student, teacher and the teacher's quantisation are called in a run's tags."""
        quantization = self._teacher.quantization if isinstance(self._teacher, TeacherConfig) else "none"
        name = self._teacher.path if isinstance(self._teacher, TeacherConfig) else _class_name(self._teacher)
        own = self.student.causal_lm.config._name_or_path or _class_name(self.student.model)
        return {"student": own, "teacher": name, "teacher_quantization": quantization}


def _check_apart(student: Student, teacher: Teacher) -> None:
    # Freezing the teacher would freeze the student, and training the student would move the teacher.
    if isinstance(student, nn.Module) and isinstance(teacher, nn.Module):
        mine = {id(p) for p in student.parameters()}
        if any(id(p) in mine for p in teacher.parameters()):
            raise UserError("teacher", "a model of its own", "one that shares weights with the student",
                            "Pass copy.deepcopy(model).")  # fmt: skip


def _class_name(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _default(teacher: Any, tokenizer: Any) -> Any:
    return None if isinstance(teacher, TeacherConfig) else tokenizer


def _tokenizer_of(model: Any, tokenizer: Any, key: str) -> Any:
    if tokenizer is not None:
        return tokenizer
    if isinstance(model, StudentConfig | TeacherConfig):
        return load_tokenizer(model, key)
    raise UserError("tokenizer", f"the tokenizer of the {key}, a model in memory", "none", "Pass tokenizer=...")


def _vocabulary_rows(model: Any, key: str) -> int:
    if isinstance(model, StudentConfig | TeacherConfig):
        return int(read_model_config(model, key).get_text_config().vocab_size)
    return int(model.get_output_embeddings().weight.shape[0])


def _as_student(student: Any, tokenizer: Any) -> LanguageModel:
    if isinstance(student, StudentConfig):
        loaded = load_student(student, tokenizer)
    else:
        loaded = LanguageModel(student, tokenizer, "student")
        loaded.check_head()
    # Hugging Face loads in eval mode and Lightning keeps the mode it finds: dropout would never be on.
    loaded.model.train()
    return loaded
