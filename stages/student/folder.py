"""What a saved student says of itself to tools and people that know nothing of this package."""

from __future__ import annotations

from pathlib import Path

_MODULE = "teacher_cache_student"
_CLASSES = {
    "AutoConfig": "MambaStudentConfig",
    "AutoModel": "MambaStudentModel",
    "AutoModelForCausalLM": "MambaStudentForCausalLM",
    "AutoModelForSequenceClassification": "MambaStudentForSequenceClassification",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
}
AUTO_MAP = {auto: f"{_MODULE}.{name}" for auto, name in _CLASSES.items()}
"""Where transformers' Auto classes find the student's, where nothing has imported them."""

_SOURCE = f'''"""This folder's classes, for transformers with trust_remote_code=True."""

from teacher_cache.stages.student import (
    {f",{chr(10)}    ".join(_CLASSES.values())},
)
'''
_CARD = """---
library_name: transformers
tags: [mamba, distillation, teacher-cache]
{pipeline}---

# {title}

A Mamba student of the package `teacher-cache`, which has its code. Import it first, and every tool
that loads a folder by transformers' Auto classes loads this one:

```python
import teacher_cache.stages.student
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

Without the import, `trust_remote_code=True` has transformers run `{module}.py`, whose only line
imports it.
"""


def describe(folder: Path, kind: str) -> None:
    """Write what a saved student needs besides its weights; a card that is there is kept.

    Args:
        folder: with the saved model.
        kind: name of the model's class.
    """
    (folder / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
    card = folder / "README.md"
    if card.exists():
        return
    auto = next((auto for auto, name in _CLASSES.items() if name == kind), "AutoModel")
    pipeline = _PIPELINES.get(auto)
    card.write_text(
        _CARD.format(
            pipeline=f"pipeline_tag: {pipeline}\n" if pipeline else "",
            title=folder.resolve().name,
            auto=auto,
            folder=folder.resolve().name,
            module=_MODULE,
        ),
        encoding="utf-8",
    )
