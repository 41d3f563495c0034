"""Before stage one: fine-tune a base encoder or decoder into a classification teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    set_seed,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import TOKEN_TYPES
from teacher_cache.stages.config import ComposedConfig, Part
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, load_corpus
from teacher_cache.stages.data.survey import survey
from teacher_cache.stages.data.tokenization import Sample, tokenize
from teacher_cache.stages.heads import SINGLE, Head
from teacher_cache.stages.losses.objective import loss_of
from teacher_cache.stages.models.device import (
    dtype_name,
    recurrences_by_device,
    resolve_device,
    resolve_dtype,
)
from teacher_cache.stages.models.pretrained import (
    hash_weights,
    longest_sample,
    reads_token_types,
    settle_pad_id,
)
from teacher_cache.stages.processes import outcome_of_main, process_group
from teacher_cache.stages.tokens.record import describe
from teacher_cache.stages.tokens.tokenizers import (
    could_not_load,
    is_local_only,
    load_tokenizer,
    require_folder,
    save_tokenizer,
)
from teacher_cache.stages.training.arguments import (
    checkpoint_to_resume,
    refuse_what_cannot_start,
    training_arguments,
)
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    BothKinds,
    SampleCollator,
    batches_per_epoch,
    held_out,
)
from teacher_cache.stages.training.config import NOT_RESULTS, FinetuneOptions
from teacher_cache.stages.training.ordered_trainer import OrderedTrainer
from teacher_cache.stages.training.run_folder import RunRecord, locked_run, saved
from teacher_cache.stages.training.task import TrainingObserver

logger = logging.getLogger(__name__)

_NUM_NAMED = 5  # labels in a message


class FinetuneTeacherConfig(ComposedConfig):
    """Everything fine-tuning needs, resolved: no preset."""

    training: Part[FinetuneOptions]
    model: str = Field(description="Base model: hub id or folder of an encoder or decoder.")
    name: str = Field(description="Short name of the data; begins the teacher's folder name.")
    labeled: CorpusConfig = Field(description="The labelled corpus to train on.")
    validation: CorpusConfig | None = Field(
        default=None, description="The labelled corpus to evaluate on; else a share is held out."
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneTeacherResult:
    """A fine-tuned teacher.

    Attributes:
        teacher: its folder, with model, tokenizer and `run.json`.
        record: as committed.
        was_complete: it had been fine-tuned before, and nothing was done.
    """

    teacher: Path
    record: RunRecord
    was_complete: bool


class TokenizedSamples:
    """Samples in memory, as training reads them, all with labels of a head of so many outputs."""

    def __init__(self, samples: list[Sample], head: Head, num_outputs: int):
        self._samples = samples
        self._head = head
        self._num_outputs = num_outputs
        self.lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """`input_ids`, `label` and, where the model is told them, `token_types`."""
        sample = self._samples[position]
        label = self._head.stored([sample.label], self._num_outputs)[0]
        types = {} if sample.token_types is None else {TOKEN_TYPES: sample.token_types}
        return {"input_ids": sample.input_ids, "label": label, **types}


class TypedCollator(SampleCollator):
    """Of a teacher, which may be told which text of a pair a token is of.

    Adds `token_type_ids` [B, S] int64 where it is.
    """

    def arrays(self, samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """One row a sample."""
        found = super().arrays(samples)
        if TOKEN_TYPES in samples[0]:
            found["token_type_ids"] = pad_batch([one[TOKEN_TYPES] for one in samples], 0)[0]
        return found


def run(
    config: FinetuneTeacherConfig, observer: TrainingObserver | None = None
) -> FinetuneTeacherResult:
    """Fine-tune a teacher and keep the best of its evaluations; resumes from its checkpoints.

    Under torchrun every process calls it alike; the first one writes, and all return its record.

    Raises:
        UserError: for anything the user can mend: data, model, settings, disk.
    """
    observer, training = observer or TrainingObserver(), config.training
    refuse_what_cannot_start(training)
    corpus = load_corpus(config.labeled)
    logger.info("training: %s", survey(corpus).describe())
    head = corpus.head or SINGLE
    if head is not SINGLE:  # whose records hold the corpus as it is read
        corpus = corpus.with_class_names(dict(enumerate(corpus.class_names())))
    validation = None
    if config.validation is not None:
        of_head = config.validation.model_copy(update={"heads": (head.name,)})
        validation = load_corpus(of_head)
    tokenizer = load_tokenizer(config.model, option="--model")
    set_seed(training.seed)  # the new head is drawn
    warn_of_empty_classes(corpus)
    model = _load_base(config.model, corpus.class_names(), head)
    max_length = longest_sample(config.model, model, tokenizer, training.max_length)
    config = config.model_copy(update={"max_length": max_length})
    folder = training.out or Path("teachers") / f"{config.name}-{Path(config.model).name}"
    record = _record(config, model, tokenizer, corpus, validation, max_length)
    with (
        process_group(resolve_device(training)),
        locked_run(folder, record, start_again=training.resume == "never") as record,
    ):
        if record.complete:
            return FinetuneTeacherResult(teacher=folder, record=record, was_complete=True)
        is_typed = corpus.num_texts > 1 and reads_token_types(model, tokenizer)
        reading = partial(_tokenized, tokenizer, max_length, is_typed)
        samples = _split(config, reading, corpus, validation)
        record = _train(config, folder, record, model, tokenizer, samples, head, observer)
    return FinetuneTeacherResult(teacher=folder, record=record, was_complete=False)


class LabelTrainer(OrderedTrainer):
    """Fine-tune a classifier on labels: their mean cost over the whole optimizer step.

    Args:
        head: what its outputs mean, which decides what a label costs.
        **kwargs: of `OrderedTrainer`.
    """

    def __init__(self, *, head: Head = SINGLE, **kwargs: Any):
        super().__init__(**kwargs)
        self._loss = loss_of(head)
        # compute_loss divides by the step's labels; Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def step_totals(self, batches: list[dict[str, torch.Tensor]]) -> int:
        """The number of labels."""
        return sum(len(batch["labels"]) for batch in batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; many models' own ignores the step."""
        labels = inputs["labels"]
        read = {name: one for name, one in inputs.items() if name != "labels"}
        outputs = model(**read)
        logits = outputs.logits[: len(labels)]  # none of a share without samples
        total = self._loss.hard_sum(logits, labels)
        loss = total / (num_items_in_batch if model.training else len(labels))
        if model.training:
            # Data parallelism averages over processes what is a sum over them.
            loss = loss * self.args.world_size
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


def _train(
    config: FinetuneTeacherConfig,
    folder: Path,
    record: RunRecord,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    samples: tuple[TokenizedSamples, TokenizedSamples | None],
    head: Head,
    observer: TrainingObserver,
) -> RunRecord:
    """Train from the newest checkpoint on and commit the best model."""
    (training, evaluation), own = samples, config.training
    per_epoch = batches_per_epoch(len(training), batch_size=own.batch_size, unlabeled_ratio=0.0)
    steps_per_epoch = -(-per_epoch // own.gradient_accumulation)
    num_steps = own.max_steps or max(1, round(own.epochs * steps_per_epoch))
    checkpoint = outcome_of_main(lambda: checkpoint_to_resume(own, folder))
    observer.on_start(folder, num_steps, checkpoint)
    pad_id = settle_pad_id(config.model, model.config, tokenizer)
    data = BothKinds(training)
    trainer = LabelTrainer(
        head=head,
        model=model,
        args=training_arguments(
            own,
            folder,
            num_steps=num_steps,
            steps_per_epoch=steps_per_epoch,
            evaluates=evaluation is not None,
            keeps_best=evaluation is not None,
            label_names=["labels"],
            measure=head.quality,
            uses_all_weights=False,
        ),
        batches=AlternatingBatches(
            data,
            batch_size=own.batch_size,
            num_batches=num_steps * own.gradient_accumulation,
            unlabeled_ratio=0.0,
            seed=own.seed,
        ),
        train_dataset=data,
        eval_dataset=evaluation,
        data_collator=TypedCollator(pad_id, head=head),
        compute_metrics=partial(_metrics, head),
        callbacks=observer.callbacks(),
    )
    record = replace(record, complete=True, result=trainer.train_to_end(checkpoint))
    return outcome_of_main(lambda: _saved(folder, model, tokenizer, record))


def _saved(
    folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, record: RunRecord
) -> RunRecord:
    """Model and tokenizer, then `run.json`, which makes them the result."""
    with saved(folder):
        model.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    record.write(folder)
    return record


def warn_of_empty_classes(corpus: Corpus) -> None:
    """Say that a teacher gets classes of which there is no document, as of labels from 1."""
    num_classes, counts = len(corpus.class_names()), corpus.label_counts() or {}
    if counts and len(counts) < num_classes:
        logger.warning(
            "the teacher of %s gets %d classes, and documents have %d labels (%s): if the others "
            "are none, write 0, 1, ... or names",
            *(corpus.config.source, num_classes, len(counts), ", ".join([*counts][:_NUM_NAMED])),
        )


def _load_base(name: str, class_names: tuple[str, ...], head: Head) -> PreTrainedModel:
    require_folder(name, "a base model", option="--model")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            local_files_only=is_local_only(name),
            dtype=torch.float32,
            num_labels=len(class_names),
            id2label=dict(enumerate(class_names)),
            label2id={name: class_id for class_id, name in enumerate(class_names)},
            ignore_mismatched_sizes=True,  # a head for other classes gives way to a new one
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # torch's, safetensors'
        raise UserError(could_not_load("base model", name, error, option="--model")) from error
    if model.config.problem_type not in (None, head.name):
        logger.warning(
            "%s was trained for %s, and is fine-tuned here into %s",
            *(name, model.config.problem_type, head.kind),
        )
        model.config.problem_type = head.name
    if head is not SINGLE:
        model.config.problem_type = head.name
    return recurrences_by_device(model)


def _record(
    config: FinetuneTeacherConfig,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    corpus: Corpus,
    validation: Corpus | None,
    max_length: int,
) -> RunRecord:
    training = config.training
    settings = training.model_dump(mode="json", exclude=set(NOT_RESULTS))
    settings["dtype"] = dtype_name(resolve_dtype(training, resolve_device(training)))
    settings["model_sha256"] = hash_weights(model)
    settings["tokenizer_sha256"] = describe(tokenizer, max_length=max_length).files_sha256
    settings["class_names"] = list(corpus.class_names())
    settings["data"] = {"train": corpus.identity, "num_documents": len(corpus)}
    if validation is not None:
        settings["data"]["validation"] = validation.identity
    return RunRecord(
        settings=settings,
        about={"model": config.model},
    )


def _split(
    config: FinetuneTeacherConfig,
    reading: Callable[[Corpus], list[Sample]],
    corpus: Corpus,
    validation: Corpus | None,
) -> tuple[TokenizedSamples, TokenizedSamples | None]:
    """Samples to train on and, if there are any, to evaluate on."""
    samples = reading(corpus)
    if validation is not None:
        names = dict(enumerate(corpus.class_names()))
        kept, held = samples, reading(validation.with_class_names(names))
    else:
        is_out = held_out((sample.sample_id for sample in samples), config.training.eval_fraction)
        kept = [sample for sample, out in zip(samples, is_out, strict=True) if not out]
        held = [sample for sample, out in zip(samples, is_out, strict=True) if out]
    labels = {sample.label for sample in kept}
    if len(labels) < 2:
        raise UserError(
            f"of the {len(corpus)} documents of {config.labeled.source}, {len(kept)} are left to "
            f"train on, of the classes {[*labels]}, expected at least two: give more "
            "(--max-samples) or hold out less (--eval-fraction)"
        )
    head, num_outputs = corpus.head or SINGLE, len(corpus.class_names())
    made = [TokenizedSamples(part, head, num_outputs) for part in (kept, held)]
    return made[0], made[1] if held else None


def _tokenized(
    tokenizer: Tokenizer, max_length: int, with_types: bool, corpus: Corpus
) -> list[Sample]:
    documents = corpus.documents(0, len(corpus))
    return tokenize(documents, tokenizer, max_length=max_length, with_types=with_types)


def _metrics(head: Head, prediction: EvalPrediction) -> dict[str, float]:
    labels = prediction.label_ids
    assert isinstance(labels, np.ndarray)
    return head.metrics(np.asarray(prediction.predictions), labels)
