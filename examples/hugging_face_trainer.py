"""A Hugging Face Trainer on a classifier's cache: any model of transformers learns from it.

    python examples/hugging_face_trainer.py CACHE MODEL OUT [STEPS]

MODEL is a hub id or folder that reads the teacher's tokens; its labels become the cache's.
"""

import sys
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from teacher_cache import (
    CachedSamples,
    CacheReader,
    SampleCollator,
    TeacherDistribution,
    divergence,
)

TEMPERATURE, ALPHA = 2.0, 0.9


class DistillingTrainer(Trainer):
    """`ALPHA` parts of what the teacher says, the rest of the labels."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """KL from the cached teacher, and cross-entropy where a document has a label."""
        teacher_logits = inputs.pop("teacher_logits")
        outputs = model(**inputs)
        teacher = TeacherDistribution.from_logits(teacher_logits, TEMPERATURE)
        kd = TEMPERATURE**2 * divergence(outputs.logits, teacher).mean()
        loss = ALPHA * kd + (1 - ALPHA) * outputs.loss
        return (loss, outputs) if return_outputs else loss


def main(cache: str, model: str, out: str, steps: str = "100") -> None:
    """Train and save."""
    reader = CacheReader(cache)
    names = {int(i): name for i, name in reader.manifest.about["id2label"].items()}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    student = AutoModelForSequenceClassification.from_pretrained(model, **labels)
    trainer = DistillingTrainer(
        model=student,
        args=TrainingArguments(
            out,
            max_steps=int(steps),
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            remove_unused_columns=False,  # the collator reads what the model does not
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=CachedSamples(reader, np.arange(len(reader)), labeled=True),
        data_collator=SampleCollator(student.config.pad_token_id or 0),
    )
    result = trainer.train()
    trainer.save_model(out)
    print(f"{result.global_step} steps, mean loss {result.training_loss:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
