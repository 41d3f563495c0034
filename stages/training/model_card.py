"""The card beside a trained student: what it learned from, how good it is, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.manifest import Manifest
from teacher_cache.stages.student.config import MambaStudentConfig, how_to_load
from teacher_cache.stages.tasks import DEFAULT_TASK
from teacher_cache.stages.training.run_folder import RunRecord, held_out_figures

CARD_NAME = "README.md"
# Of a run's figures those that a card tells: their names there, and as a percentage or not.
FIGURES: dict[str, tuple[str, bool]] = {
    "accuracy": ("accuracy", True),
    "f1": ("macro F1", True),
    "micro_f1": ("micro F1", True),
    "macro_f1": ("macro F1", True),
    "exact_match": ("all labels right", True),
    "mse": ("mean squared error", False),
    "pearson": ("Pearson's correlation", False),
    "ece": ("calibration error (ECE)", True),
    "perplexity": ("perplexity", False),
    "bits_per_byte": ("bits a byte", False),
    "agreement": ("agreement with the teacher", True),
    "kl": ("KL from the teacher, nats", False),
}
PIPELINES = {"classification": "text-classification", "lm": "text-generation"}


def model_card(
    name: str,
    record: RunRecord,
    manifest: Manifest,
    config: Any,
    *,
    figures: Mapping[str, float],
    measured_on: str,
) -> str:
    """The whole file, its metadata as the hub reads them.

    Args:
        name: of the student.
        record: of its run.
        manifest: of the cache that it was trained from.
        config: of the model.
        figures: by name; those of `FIGURES` are told.
        measured_on: what they were measured on, as a heading goes on.
    """
    told = {
        words: (100 * figures[key] if is_share else figures[key])
        for key, (words, is_share) in FIGURES.items()
        if isinstance(figures.get(key), int | float)
    }
    task = record.settings.get("task", DEFAULT_TASK)
    teacher = named(manifest.about.get("teacher"))
    kind = next(iter(getattr(config, "architectures", None) or ["AutoModel"]))
    is_ours = isinstance(config, MambaStudentConfig)
    data = ModelCardData(
        library_name="transformers",
        tags=["mamba", "distillation", "teacher-cache"] if is_ours else ["distillation"],
        pipeline_tag=PIPELINES.get(task),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=PIPELINES.get(task, task),
                dataset_type=_data_of(manifest)[0],
                dataset_name=measured_on,
                metric_type=words,
                metric_value=round(value, 4),
            )
            for words, value in told.items()
        ]
        or None,
        base_model=teacher if teacher.count("/") == 1 else None,
    )
    shown = [(words, f"{value:,.4g}") for words, value in told.items()]
    result = record.result or {}
    origin = [
        ("teacher", teacher),
        ("its weights, SHA-256", str(record.about.get("teacher_weights_sha256", "unknown"))),
        ("text", ", ".join(_data_of(manifest))),
        ("cache, fingerprint", manifest.fingerprint),
        ("steps", f"{result.get('num_steps', 0):,}"),
        ("objective", _objective(record)),
        *((library, found) for library, found in manifest.versions.items()),
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"A student that learned from what {teacher} said of text, kept in a cache of the package "
        "`teacher-cache`: the teacher itself was not there.\n",
        how_to_load(kind) if is_ours else _plain_loading(task),
        f"## On {measured_on}\n\n{_table(('figure', 'value'), shown)}" if shown else "",
        f"## What it was made of\n\n{_table(('', ''), origin)}",
        "Nothing is known of how it does on text unlike its teacher's, or of what its teacher gets "
        "wrong: it learned to say the same.\n",
    ]
    return "\n".join(part for part in parts if part)


def write_card(folder: Path, record: RunRecord, manifest: Manifest, config: Any) -> None:
    """Write a run's card, with what its training measured of what it held out.

    Raises:
        UserError: where the file system refuses.
    """
    text = model_card(
        folder.resolve().name,
        record,
        manifest,
        config,
        figures=held_out_figures(record),
        measured_on="what was held out of training",
    )
    write_bytes_atomically(folder / CARD_NAME, text.encode())


def named(place: object) -> str:
    """A hub id as it is; of a folder its last name, since paths are of one machine."""
    text = str(place)
    return Path(text).name if Path(text).is_absolute() or text.count("/") != 1 else text


def _data_of(manifest: Manifest) -> list[str]:
    """Names of the corpora, each with its split."""
    corpora = manifest.settings.get("data", {})
    found = []
    for one in corpora.values():
        if isinstance(one, Mapping):
            name = named(one.get("name") or one.get("kind") or "text")
            found.append(f"{name} ({one['split']})" if one.get("split") else name)
    return list(dict.fromkeys(found)) or ["text"]


def _objective(record: RunRecord) -> str:
    names = ("alpha", "unlabeled_alpha", "temperature", "divergence")
    return ", ".join(f"{one} {record.settings[one]}" for one in names if one in record.settings)


def _plain_loading(task: str) -> str:
    auto = {"classification": "AutoModelForSequenceClassification"}.get(
        task, "AutoModelForCausalLM"
    )
    return (
        f"```python\nfrom transformers import AutoTokenizer, {auto}\n\n"
        f'model = {auto}.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n'
    )


def _table(headings: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {headings[0]} | {headings[1]} |", "|---|---|"]
    lines += [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(lines) + "\n"
