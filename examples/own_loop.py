"""A training loop of one's own on a classifier's cache: a Mamba student, in plain PyTorch.

python examples/own_loop.py CACHE OUT [STEPS]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from teacher_cache import (
    CachedSamples,
    CacheReader,
    MambaStudentConfig,
    MambaStudentForSequenceClassification,
    SampleCollator,
    TeacherDistribution,
    divergence,
)

TEMPERATURE = 2.0


def main(cache: str, out: str, steps: str = "100") -> None:
    """Train on all labelled documents, and save a folder of transformers."""
    torch.manual_seed(0)
    reader = CacheReader(cache)
    tokenizer = AutoTokenizer.from_pretrained(Path(cache, "teacher").resolve())
    names = {int(i): name for i, name in reader.manifest.about["id2label"].items()}
    student = MambaStudentForSequenceClassification(
        MambaStudentConfig(
            vocab_size=len(tokenizer),
            d_model=64,
            num_layers=2,
            expand=2,
            d_state=16,
            head_dim=32,
            pooling="mean",
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )
    )
    samples = CachedSamples(reader, np.arange(len(reader)), labeled=True)
    batches = DataLoader(
        samples, 16, shuffle=True, collate_fn=SampleCollator(tokenizer.pad_token_id or 0)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    student.train()
    step = 0
    while step < int(steps):
        for batch in batches:
            logits = student(batch["input_ids"], batch["attention_mask"]).logits
            teacher = TeacherDistribution.from_logits(batch["teacher_logits"], TEMPERATURE)
            # Hinton et al. 2015: T^2 keeps the gradient's size whatever T is.
            loss = TEMPERATURE**2 * divergence(logits, teacher).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == 1 or step == int(steps):
                agrees = (logits.argmax(-1) == batch["teacher_logits"].argmax(-1)).float().mean()
                print(f"step {step}: loss {loss.item():.3f}, agrees {agrees.item():.2f}")
            if step == int(steps):
                break
    student.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
