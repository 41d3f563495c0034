"""Evaluating language models: a teacher speaks at every position that has a next token.

The teacher's part comes from running it over the text, or from a cache, which needs no teacher.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.conversations import ChatReading
from teacher_cache.stages.data.corpus import Document, load_corpus
from teacher_cache.stages.data.packing import PackedRow, packed_rows
from teacher_cache.stages.evaluation.config import ClassifyingOptions, GenerationOptions
from teacher_cache.stages.evaluation.details import (
    Details,
    Disagreement,
    Judged,
    ModelDetails,
    bins_of,
    intervals_of,
    largest_of_documents,
)
from teacher_cache.stages.evaluation.models import TEACHER, LanguageModel, TeacherModel
from teacher_cache.stages.evaluation.references import CachedReference, LiveReference
from teacher_cache.stages.evaluation.runs import held_out_of
from teacher_cache.stages.evaluation.scores import Score, Scores, num_predicted_bytes, score
from teacher_cache.stages.evaluation.task import (
    NOTHING_MORE,
    EvaluateConfig,
    Say,
    Scored,
    Written,
)
from teacher_cache.stages.models.device import resolve_device
from teacher_cache.stages.teacher.config import ChatConfig
from teacher_cache.stages.tokens.chat_template import ChatRecord, Untold, listed_ids
from teacher_cache.stages.tokens.frame import surroundings

DEFAULT_NEW_TOKENS = 50  # of `pipe predict`
PROMPT_TOKENS = 16
NEW_TOKENS = 32  # of an evaluation
CONTEXT_TOKENS = 48  # that are shown before a position


def check_generation(options: GenerationOptions) -> None:
    """Refuse what would do nothing.

    Raises:
        UserError: if options of drawing are given, and nothing is drawn.
    """
    idle = [one for one in options.flags if one in ("--temperature", "--seed")]
    if idle and not options.do_sample:
        raise UserError(
            f"{' and '.join(idle)} is of --do-sample, and the most probable token is taken: give "
            "--do-sample, or leave that out"
        )


def continuation(
    model: LanguageModel,
    prompt: list[int],
    options: GenerationOptions,
    *,
    stop_ids: Sequence[int] = (),
) -> str:
    """What the model writes behind a prompt; the same whatever it wrote before.

    A Mamba student reads the prompt once and then goes on from its state, one token at a time.

    Args:
        model: in evaluation mode.
        prompt: its tokens, at least one.
        options: checked by `check_generation`.
        stop_ids: with which it ends, besides the end of text.

    Raises:
        UserError: if the model has no positions for so many tokens.
    """
    num_new = options.max_new_tokens or DEFAULT_NEW_TOKENS
    if len(prompt) + num_new > model.num_positions:
        raise UserError(
            f"{model.name} reads {model.num_positions:g} tokens, and the prompt's {len(prompt)} "
            f"and --max-new-tokens {num_new} are more: give less"
        )
    ids = torch.tensor([prompt], device=model.model.device)
    drawing: dict[str, Any] = {"do_sample": False}
    if options.do_sample:
        # Of the whole vocabulary: no top-k or top-p that nobody asked for.
        drawing = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        drawing["temperature"] = float(options.temperature or 1)
    generator: Any = model.model
    around = surroundings(model.tokenizer)
    stops = {*around.stop_ids, *listed_ids(generator.generation_config.eos_token_id)}
    stops |= set(stop_ids)
    is_on = model.autocast is not torch.float32
    devices = [ids.device] if ids.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(),
        torch.autocast(ids.device.type, model.autocast, enabled=is_on),
    ):
        torch.manual_seed(options.seed or 0)
        found = generator.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            eos_token_id=sorted(stops) or None,
            pad_token_id=generator.config.pad_token_id or generator.config.eos_token_id or 0,
            **drawing,
        )
    written = list(takewhile(lambda one: one not in stops, found[0, len(prompt) :].tolist()))
    return _text_behind(model.tokenizer, prompt, written)


def _text_behind(tokenizer: Any, prompt: list[int], written: list[int]) -> str:
    """What ids write behind a prompt's, with the space between them where there is one."""
    head, whole, alone = (
        str(tokenizer.decode(ids, skip_special_tokens=True))
        for ids in (prompt, [*prompt, *written], written)
    )
    # A decoder that mends spaces may change what stands before, too.
    return whole[len(head) :] if whole.startswith(head) else alone


def prompt_ids(model: LanguageModel, text: str) -> list[int]:
    """The tokens of a text to go on with: without what the tokenizer puts behind it.

    Raises:
        UserError: if there are none.
    """
    around = surroundings(model.tokenizer)
    found = list(model.tokenizer(text, verbose=False)["input_ids"])
    ids = around.without_end(around.with_one_begin(found))
    if not ids:
        raise UserError("there is no text to go on with: give one")
    return ids


def answer(model: LanguageModel, run: Path, text: str, options: GenerationOptions) -> str:
    """What a student answers to a user who says a text, its turn's end left out.

    Raises:
        UserError: if it has learned no conversations, or its template refuses such a beginning.
    """
    record = ChatRecord.read(run)
    if record is None or not model.tokenizer.chat_template:
        raise UserError(
            f"--chat is of students that were trained on conversations, and {run} was trained on "
            "texts: leave it out"
        )
    template = record.template(model.tokenizer)
    try:
        prompt = template.render([{"role": "user", "content": text}], has_prompt=True)
    except Untold as error:
        raise UserError(f"the text cannot be answered: {error}") from error
    ids = list(model.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    known = model.tokenizer.get_vocab()
    stops = [known[end] for end in record.ends if end in known]
    return continuation(model, ids, options, stop_ids=stops)


@dataclass(frozen=True, kw_only=True)
class LanguageModelEvaluation:
    """One row of the comparison; None where a column does not apply. Means over positions.

    Attributes:
        legend: what the figures mean, in a line.
        name: `teacher`, or the run's folder name.
        num_positions: that count: those with a next token in their document.
        nll: negative log-likelihood of the next token, nats.
        perplexity: `exp(nll)`; of tokens, so only models of one tokenizer compare.
        bits_per_byte: negative log2-likelihood a byte of the predicted tokens' text.
        agreement: share of positions with the teacher's most probable token.
        kl: from the teacher's distribution, nats.
        num_parameters: embeddings included.
        megabytes: of the parameters, 10**6 bytes.
        latency_ms: milliseconds of one forward pass of one document, by length in tokens.
        written: what it writes, taking the most probable token, behind the result's `prompt`.
    """

    legend: ClassVar[str] = (
        "perplexity: of a token; agrees: the teacher's most probable token is chosen; KL: from "
        "the teacher's distribution, mean nats of a position"
    )

    name: str
    num_positions: int
    nll: float
    perplexity: float
    bits_per_byte: float | None = None
    agreement: float | None = None
    kl: float | None = None
    num_parameters: int | None = None
    megabytes: float | None = None
    latency_ms: dict[int, float] | None = None
    written: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Judging:
    """Models on the same rows, with what was found there."""

    models: Sequence[LanguageModel]
    rows: Sequence[PackedRow]
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class ReadText:
    """Text, packed for each student as it reads it.

    Attributes:
        students: that read it.
        documents: that are not empty.
        packed: rows of each student.
        batch_tokens: padded tokens in a forward batch.
    """

    students: Sequence[LanguageModel]
    documents: list[Document]
    packed: Sequence[Sequence[PackedRow]]
    batch_tokens: int

    def score(self, teacher: TeacherModel | None, say: Say) -> Scored:
        """The teacher beside those students that read the very same samples, the others alone."""
        marks: dict[str, str] = {}
        rows: dict[str, LanguageModelEvaluation] = {}
        judged: list[_Judging] = []
        if teacher is not None:
            rows |= self._beside(teacher, say, marks, judged)
        for one, own in zip(self.students, self.packed, strict=True):
            if one.name in rows:
                continue
            say(f"reading {_num_positions(own):,} positions with {one.name}")
            scores = score([one], own, None, batch_tokens=self.batch_tokens)
            judged.append(_Judging(models=[one], rows=own, scores=scores))
            rows[one.name] = _row(one, own, scores.models[0], marks)
            if teacher is not None:
                apart = (
                    "reads other samples than the teacher (tokenizer or --max-length), so there is "
                    "no KL or agreement"
                )
                caveat = marks.get(one.name)
                marks[one.name] = (
                    f"{apart}: compare bits a byte" if caveat is None else f"{apart}; {caveat}"
                )
        names = [*([] if teacher is None else [TEACHER]), *(one.name for one in self.students)]
        return Scored(
            num_documents=len(self.documents),
            rows=[rows[name] for name in names],
            marks=marks,
            details=_details(judged, names),
        )

    def _beside(
        self, teacher: TeacherModel, say: Say, marks: dict[str, str], judged: list[_Judging]
    ) -> dict[str, LanguageModelEvaluation]:
        """Rows of the teacher, and of the students that read what it reads."""
        is_chat = any(one.tokens is not None for one in self.documents)
        theirs = self.students[0].tokenizer.get_vocab()
        if is_chat and teacher.tokenizer.get_vocab() != theirs:
            raise UserError(
                "the teacher has other tokens than the students' conversations: give --teacher none"
            )
        own = packed_rows(self.documents, teacher.tokenizer, max_length=teacher.max_length)
        together = [
            one
            for one, rows in zip(self.students, self.packed, strict=True)
            if _reads_as(teacher, own, one, rows)
        ]
        say(f"reading {_num_positions(own):,} positions with {_listed([teacher, *together])}")
        reference = LiveReference(teacher=teacher, rows=own)
        scores = score(together, own, reference, batch_tokens=self.batch_tokens)
        assert scores.teacher is not None, "there is a reference"
        judged.append(_Judging(models=together, rows=own, scores=scores))
        found = {TEACHER: _row(teacher, own, scores.teacher, marks)}
        for one, its_score in zip(together, scores.models, strict=True):
            found[one.name] = _row(one, own, its_score, marks)
        return found

    def written(self, models: Sequence[LanguageModel], say: Say) -> Written:
        """What the models go on with behind the first document's beginning."""
        return _written(models, _prompt(self.students[0], self.packed[0]), say)


@dataclass(frozen=True, kw_only=True)
class ReadCache:
    """A cache's samples, or where a run was trained on it those that the runs held out.

    Attributes:
        students: that read them, of one tokenizer.
        reference: what the cache keeps of its teacher.
        batch_tokens: padded tokens in a forward batch.
    """

    students: Sequence[LanguageModel]
    reference: CachedReference
    batch_tokens: int

    def score(self, teacher: TeacherModel | None, say: Say) -> Scored:
        """Each student beside what the cache has of the teacher."""
        read = self.reference.rows
        say(f"reading {_num_positions(read):,} positions with {_listed(self.students)}")
        scores = score(self.students, read, self.reference, batch_tokens=self.batch_tokens)
        assert scores.teacher is not None, "there is a reference"
        marks: dict[str, str] = {}
        rows = [
            _row(one, read, its_score, marks)
            for one, its_score in zip(self.students, scores.models, strict=True)
        ]
        # Of one tokenizer, so a byte is worth as much to each.
        per_nat = None if rows[0].bits_per_byte is None else rows[0].bits_per_byte / rows[0].nll
        of_teacher = LanguageModelEvaluation(
            name=TEACHER,
            num_positions=scores.num_positions,
            nll=scores.teacher.nll,
            perplexity=scores.teacher.perplexity,
            bits_per_byte=None if per_nat is None else per_nat * scores.teacher.nll,
        )
        return Scored(
            num_documents=sum(len(row.lengths) for row in read),
            rows=[of_teacher, *rows],
            marks=marks,
            details=_details(
                [_Judging(models=self.students, rows=read, scores=scores)],
                [one.name for one in (of_teacher, *rows)],
            ),
        )

    def written(self, models: Sequence[LanguageModel], say: Say) -> Written:
        """What the models go on with behind the first document's beginning."""
        return _written(models, _prompt(self.students[0], self.reference.rows), say)


class LanguageModeling:
    """Language models, on text or on a cache."""

    row_names = (TEACHER,)
    student = LanguageModel
    teacher = TeacherModel

    def read(
        self, config: EvaluateConfig, students: Sequence[LanguageModel]
    ) -> ReadText | ReadCache:
        """Read the text, or the cache.

        Raises:
            UserError: if it does not fit the students.
            CheckFailed: if the cache's head is damaged or missing.
        """
        if config.cache is not None:
            return _read_cache(config, config.cache, students)
        assert config.corpus is not None, "asked before"
        corpus = load_corpus(config.corpus)
        if corpus.chat_columns is not None:
            corpus = corpus.rendered(_chat_reading(config.runs, students))
        documents = corpus.documents_with_text()
        packed = [
            packed_rows(documents, one.tokenizer, max_length=one.max_length) for one in students
        ]
        for student, rows in zip(students, packed, strict=True):
            _require_positions(student.name, rows)
        return ReadText(
            students=students, documents=documents, packed=packed, batch_tokens=config.batch_tokens
        )

    def predict(
        self,
        run: Path,
        texts: Sequence[str],
        *,
        device: DeviceConfig,
        generation: GenerationOptions,
        classifying: ClassifyingOptions = NOTHING_MORE,
        one_a_line: bool,
    ) -> Iterator[str]:
        """Each text with what the model writes behind it; as a JSON string if it is to be a line.

        Raises:
            UserError: for an empty text, or options that mean nothing.
        """
        check_generation(generation)
        if classifying.flags:
            raise UserError(
                f"{', '.join(classifying.flags)} is of classifiers, and {run} is a language "
                "model: leave that out"
            )
        num_empty = sum(not text.strip() for text in texts)
        if num_empty:
            raise UserError(f"{num_empty} of {len(texts)} texts are empty: leave them out")
        model = self.student.of_run(run, device)
        for text in texts:
            if generation.chat:
                whole = answer(model, run, text, generation)
            else:
                whole = text + continuation(model, prompt_ids(model, text), generation)
            yield json.dumps(whole, ensure_ascii=False) if one_a_line else whole


def _details(judgings: Sequence[_Judging], names: Sequence[str]) -> Details:
    """Intervals, bins and disagreements of models, in the order of their rows."""
    judged: dict[str, Judged] = {}
    disagreements: dict[str, list[Disagreement]] = {}
    for judging in judgings:
        found = judging.scores.positions
        where: dict[str, Any] = {"document": found.document, "length": found.place}
        if not np.isnan(found.top_prob).all():
            where["confidence"] = found.top_prob
        for i, one in enumerate(judging.models):
            figures = {"nll": found.nll[i], "kl": found.kl[i], "agreement": found.agrees(i)}
            judged[one.name] = Judged(**where, figures=figures)
            disagreements[one.name] = _disagreements(judging, i)
        if judging.scores.teacher is not None:
            judged[TEACHER] = Judged(**where, figures={"nll": found.nll[-1]})
    ordered: Mapping[str, Judged] = {name: judged[name] for name in names}
    intervals, differences = intervals_of(ordered)
    return Details(
        models={
            name: ModelDetails(
                intervals=intervals[name],
                disagreements=disagreements.get(name, ()),
                **bins_of(one),
            )
            for name, one in ordered.items()
        },
        differences=differences,
    )


def _disagreements(judging: _Judging, i: int) -> list[Disagreement]:
    """The positions at which a model is farthest from its teacher, where that is known."""
    found, tokenizer = judging.scores.positions, judging.models[i].tokenizer
    if judging.scores.teacher is None or not (found.top_id >= 0).any():
        return []
    first = np.searchsorted(found.row, found.row)  # of each position's row

    def named(token_id: int) -> str:
        return str(tokenizer.decode([token_id]))

    answers = []
    for at in largest_of_documents(found.kl[i], found.document):
        row = judging.rows[int(found.row[at])]
        position = int(np.flatnonzero(row.loss_mask)[at - first[at]])
        start = max(position + 1 - int(found.place[at]), position + 1 - CONTEXT_TOKENS)
        answers.append(
            Disagreement(
                text=str(tokenizer.decode(row.input_ids[start : position + 1].tolist())),
                truth=named(int(row.input_ids[position + 1])),
                kl=float(found.kl[i, at]),
                teacher=[(named(int(found.top_id[at])), float(found.top_prob[at]))],
                student=[(named(int(found.student_id[i, at])), float(found.student_prob[i, at]))],
            )
        )
    return answers


def _chat_reading(runs: Sequence[Path], students: Sequence[LanguageModel]) -> ChatReading:
    """How all the students read conversations.

    Raises:
        UserError: if one has learned none, or two have learned them otherwise.
    """
    records = [ChatRecord.read(run) for run in runs]
    first = records[0]
    for run, record, student in zip(runs, records, students, strict=True):
        if record is None:
            raise UserError(
                f"{run} was trained on texts, and --data holds conversations: give texts, or "
                "students of conversations"
            )
        same = {"messages", "tools", "text"}
        assert first is not None, "it was the first to be asked"
        if (
            record.model_dump(exclude=same) != first.model_dump(exclude=same)
            or student.tokenizer.get_vocab() != students[0].tokenizer.get_vocab()
            or student.max_length != students[0].max_length
        ):
            raise UserError(
                f"{run} and {runs[0]} read conversations otherwise (template, tokenizer, --loss-on "
                "or length): evaluate them apart"
            )
    assert first is not None, "there is a run"
    config = ChatConfig.model_validate(
        {
            "loss_on": first.loss_on,
            "chat_template_kwargs": first.variables,
            "chat_date": first.date,
            "end_of_turn": first.ends,
            "unusable_conversations": "drop",
        }
    )
    return ChatReading.of(
        config, students[0].tokenizer, end_ids=(), max_length=students[0].max_length
    )


def _read_cache(
    config: EvaluateConfig, cache: Path, students: Sequence[LanguageModel]
) -> ReadCache:
    if config.teacher not in (None, "none"):
        raise UserError(
            f"--teacher {config.teacher} is run over text, and --cache has what the teacher said: "
            "leave one of them out"
        )
    for one in students[1:]:
        if one.tokenizer.get_vocab() != students[0].tokenizer.get_vocab():
            raise UserError(
                f"{one.name} and {students[0].name} have different tokenizers: evaluate them on "
                "--cache apart"
            )
    reader = CacheReader(cache)
    held_out = held_out_of(config.runs, reader)
    _require_language_model(reader)
    reference = CachedReference.of_cache(
        reader, students[0].tokenizer, held_out=held_out, device=resolve_device(config)
    )
    _require_positions(str(cache), reference.rows)
    return ReadCache(students=students, reference=reference, batch_tokens=config.batch_tokens)


def _require_language_model(reader: CacheReader) -> None:
    task = reader.manifest.settings.get("task", "classification")
    if task != LanguageModel.task:
        raise UserError(
            f"--cache {reader.cache} is of the task {task!r}: give a language model's cache, or "
            "text with --data"
        )


def _row(
    model: LanguageModel, rows: Sequence[PackedRow], its_score: Score, marks: dict[str, str]
) -> LanguageModelEvaluation:
    """A row of the table; `marks` is told what is not exact about it."""
    num = _num_positions(rows)
    try:
        num_bytes, caveat = num_predicted_bytes(rows, model.tokenizer)
    except UserError:
        num_bytes, caveat = 0, "its tokenizer does not tell the bytes of a token"
    bits = its_score.nll * num / math.log(2) / num_bytes if num_bytes else None
    if caveat is not None:
        marks[model.name] = f"bits a byte: {caveat}"
    return LanguageModelEvaluation(
        name=model.name,
        num_positions=num,
        nll=its_score.nll,
        perplexity=its_score.perplexity,
        bits_per_byte=bits,
        agreement=its_score.agreement,
        kl=its_score.kl,
    )


def _require_positions(name: str, rows: Sequence[PackedRow]) -> None:
    """Refuse text that predicts nothing.

    Raises:
        UserError: saying for whom.
    """
    if not _num_positions(rows):
        raise UserError(f"no token of the text has a next one for {name} to predict: give more")


def _num_positions(rows: Sequence[PackedRow]) -> int:
    """How many positions count."""
    return sum(int(row.loss_mask.sum()) for row in rows)


def _reads_as(
    teacher: TeacherModel,
    own: Sequence[PackedRow],
    student: LanguageModel,
    rows: Sequence[PackedRow],
) -> bool:
    """Whether a student gets the teacher's samples, id by id, and its ids mean the same."""
    ids = student.tokenizer.get_vocab()
    return (
        len(own) == len(rows)
        and all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(own, rows, strict=True))
        and all(ids.get(token) == one for token, one in teacher.tokenizer.get_vocab().items())
    )


def _listed(models: Sequence[LanguageModel]) -> str:
    return ", ".join(one.name for one in models)


def _prompt(model: LanguageModel, rows: Sequence[PackedRow]) -> str:
    """The beginning of the first document that has a next token."""
    documents = (
        ids
        for row in rows
        for ids in np.split(row.input_ids, np.cumsum(row.lengths)[:-1])
        if len(ids) > 1
    )
    beginning = next(documents)[:PROMPT_TOKENS].tolist()
    return str(model.tokenizer.decode(beginning, skip_special_tokens=True))


def _written(models: Sequence[LanguageModel], prompt: str, say: Say) -> Written:
    say("writing")
    return Written(prompt=prompt, by_name={one.name: _continuation(one, prompt) for one in models})


def _continuation(model: LanguageModel, prompt: str) -> str | None:
    """What a model goes on with; None where it cannot."""
    if not prompt.strip():
        return None
    ids = prompt_ids(model, prompt)
    num_new = int(min(NEW_TOKENS, model.num_positions - len(ids)))
    if num_new < 1:
        return None
    return continuation(model, ids, GenerationOptions(max_new_tokens=num_new))
