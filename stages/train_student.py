"""Stage two: train a student from the cached shards alone; no teacher in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from teacher_cache.cache.commit import canonical_json
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.config import refuse_foreign_options
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.join import Joined, join
from teacher_cache.stages.models.device import (
    dtype_name,
    missing_libraries,
    resolve_device,
    resolve_dtype,
    warn_of_missing_kernels,
)
from teacher_cache.stages.processes import outcome_of_main, process_group
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.pretrained import own_tokenizer
from teacher_cache.stages.student.scans.dispatch import missing_kernels
from teacher_cache.stages.tasks import task_named
from teacher_cache.stages.tokens.record import describe
from teacher_cache.stages.tokens.tokenizers import save_tokenizer
from teacher_cache.stages.training.arguments import (
    checkpoint_to_resume,
    refuse_what_cannot_start,
    training_arguments,
)
from teacher_cache.stages.training.config import (
    NOT_RESULTS,
    ArchitectureConfig,
    TrainStudentConfig,
)
from teacher_cache.stages.training.data import open_splits
from teacher_cache.stages.training.measures import EarlyStopping
from teacher_cache.stages.training.model_card import write_card
from teacher_cache.stages.training.run_folder import PAIR, RunRecord, locked_run, saved
from teacher_cache.stages.training.start import StartingStudent
from teacher_cache.stages.training.task import Course, StudentTask, TrainingObserver
from teacher_cache.stages.training.trainer import StudentTrainer


@dataclass(frozen=True, kw_only=True)
class TrainStudentResult:
    """A trained student.

    Attributes:
        run: its folder, with model, tokenizer and `run.json`.
        record: as committed.
        was_complete: it had been trained before, and nothing was done.
    """

    run: Path
    record: RunRecord
    was_complete: bool


class StageTwoObserver(TrainingObserver):
    """Told what happens in stage two; the base says nothing."""

    def on_join(self, joined: Joined) -> None:
        """The tokenization was compared, and training may start."""


def run(config: TrainStudentConfig, observer: StageTwoObserver | None = None) -> TrainStudentResult:
    """Train a student from a cache; resumes from the newest committed checkpoint.

    Under torchrun every process calls it alike; the first one writes, and all return its record.

    Raises:
        UserError: for anything the user can mend.
        TokenizationMismatch: if the student would read the cached ids as other tokens.
        BadShardError: if a shard is damaged.
    """
    observer = observer or StageTwoObserver()
    training = config.training
    refuse_what_cannot_start(training)
    if training.cache is None:
        raise UserError("no cache was named: give --cache DIR")
    readers = open_splits(training.cache, config.objective.unlabeled_alpha, training.unlabeled_from)
    known = task_named(readers[0].manifest.settings["task"], training.cache)
    refuse_foreign_options(config, task=known.name)
    task = known.student(config, readers)
    longest_sample = max(int(reader.lengths().max()) for reader in readers)
    own = with_own_tokenizer(config, known.student)
    joined = join(training.cache, own, longest_sample=longest_sample)
    observer.on_join(joined)
    # All that can be refused is refused before the folder of the run is made.
    course = task.course(joined)

    record = _record(config, readers, joined, course.student)
    folder = training.out or Path("runs") / f"{training.cache.name}-{_settings_hash(record)}"
    with (
        process_group(resolve_device(training)),
        locked_run(folder, record, start_again=training.resume == "never") as record,
    ):
        if record.complete:
            return TrainStudentResult(run=folder, record=record, was_complete=True)
        record = _train(config, folder, record, task, course, joined, observer)
    return TrainStudentResult(run=folder, record=record, was_complete=False)


def check_architecture(config: ArchitectureConfig, task: type[StudentTask]) -> None:
    """Refuse what needs no cache to be seen: sizes that do not fit, a model that is not there.

    Args:
        config: the student's.
        task: of the cache.

    Raises:
        UserError: saying what to give instead.
    """
    if config.copies_teacher:
        return  # its sizes are the teacher's
    if config.pretrained is None:
        MambaStudentConfig(**config.shape(task.name))
    else:
        task.described(config.pretrained)


def with_own_tokenizer(config: TrainStudentConfig, task: type[StudentTask]) -> JoinConfig:
    """A pre-trained student's own tokenizer, unless one is named or it has none.

    Its embeddings mean that tokenizer's tokens, so that is the one to compare with the cache's.

    Args:
        config: the run's settings.
        task: of the cache.

    Raises:
        UserError: if the student cannot be had: sizes that do not fit, a model that is not there.
    """
    check_architecture(config.student, task)
    name = config.student.pretrained
    if name is None or config.join.student_tokenizer is not None:
        return config.join
    return config.join.model_copy(update={"student_tokenizer": own_tokenizer(name)})


def _train(
    config: TrainStudentConfig,
    folder: Path,
    record: RunRecord,
    task: StudentTask,
    course: Course,
    joined: Joined,
    observer: StageTwoObserver,
) -> RunRecord:
    """Train from the newest checkpoint on and commit the student."""
    checkpoint = outcome_of_main(lambda: checkpoint_to_resume(config.training, folder))
    observer.on_start(folder, course.data.num_steps, checkpoint)
    trainer = _trainer(config, folder, task, course, observer)
    record = replace(record, complete=True, result=trainer.train_to_end(checkpoint))
    assert config.training.cache is not None, "it was read"
    manifest = read_manifest(config.training.cache)
    return outcome_of_main(lambda: _saved(folder, course, joined, record, manifest))


def _record(
    config: TrainStudentConfig,
    readers: Sequence[CacheReader],
    joined: Joined,
    student: StartingStudent,
) -> RunRecord:
    reader = readers[0]
    parts = [config.training, config.projection, config.join, config.objective]
    if config.transfer.transfers:  # so runs that match nothing inside keep their settings
        parts.append(config.transfer)
    # Others stand for themselves: files by their hashes, and the student says what it is.
    left_out = {"cache", "student_tokenizer", "projection_embeddings", *NOT_RESULTS}
    settings = {
        name: value
        for part in parts
        for name, value in part.model_dump(mode="json", exclude=left_out).items()
    }
    settings |= student.settings
    settings["dtype"] = dtype_name(resolve_dtype(config.training, resolve_device(config.training)))
    tokenizer = describe(joined.tokenizer, max_length=joined.max_length)
    settings["student_tokenizer_sha256"] = tokenizer.files_sha256
    if joined.alignment is not None:
        settings["alignment"] = joined.alignment.settings
    settings["cache_fingerprint"] = reader.manifest.fingerprint
    # The fingerprint leaves the number of documents out: a cache grows, and this run must not.
    settings["cache_samples"] = {reader.split: len(reader) for reader in readers}
    differences = [difference.name for difference in joined.report.differences]
    return RunRecord(
        settings=settings,
        about={
            "cache": str(reader.cache.resolve()),
            "teacher": reader.manifest.about["teacher"],
            "tokenization": differences or "verified",
            "max_length": joined.max_length,
            "teacher_max_length": reader.manifest.settings["max_length"],
            "teacher_weights_sha256": reader.manifest.settings["teacher"]["weights_sha256"],
            **({} if joined.coverage is None else {"coverage": joined.coverage.to_json()}),
            **student.about,
        },
    )


def _settings_hash(record: RunRecord) -> str:
    return hashlib.sha256(canonical_json(record.settings).encode()).hexdigest()[:8]


def _trainer(
    config: TrainStudentConfig,
    folder: Path,
    task: StudentTask,
    course: Course,
    observer: StageTwoObserver,
) -> StudentTrainer:
    data, callbacks = course.data, observer.callbacks()
    patience = config.training.early_stopping
    if patience is not None:
        callbacks.append(EarlyStopping(patience, task.measure))
    args = training_arguments(
        config.training,
        folder,
        num_steps=data.num_steps,
        steps_per_epoch=data.steps_per_epoch,
        evaluates=data.evaluation is not None,
        keeps_best=patience is not None,
        label_names=course.held_out.label_names,
        measure=task.measure,
        uses_all_weights=config.student.pretrained is None,
    )
    student = course.student.model
    if args.device.type == "cuda":
        is_ours = isinstance(student.config, MambaStudentConfig)
        warn_of_missing_kernels(
            student,
            missing_kernels(student.config.arch, args.device)
            if is_ours
            else missing_libraries(student),
        )
    return StudentTrainer(
        model=course.trained,
        args=args,
        lesson=course.lesson(args.device),
        held_out=course.held_out,
        embedding_lr_scale=config.training.embedding_lr_scale,
        batches=data.batches,
        train_dataset=data.training,
        eval_dataset=data.evaluation,
        data_collator=course.collator,
        callbacks=callbacks,
    )


def _saved(
    folder: Path, course: Course, joined: Joined, record: RunRecord, manifest: Manifest
) -> RunRecord:
    """Model, tokenizer and card, then `run.json`, which makes them the result."""
    tokenizer = joined.tokenizer
    # The student reads ids and mask alone.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if PAIR in record.about:  # only of pairs do token types say anything; transformers saves this
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    tokenizer.model_max_length = course.max_length or VERY_LARGE_INTEGER
    with saved(folder):
        course.student.model.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    if joined.chat is not None:
        joined.chat.write(folder)
    course.write_files(folder)
    write_card(folder, record, manifest, course.student.model.config)
    record.write(folder)
    return record
