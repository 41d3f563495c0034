"""What a person types for each golden artefact; paths are relative to the folder it is made in."""

from __future__ import annotations

_CLASSIFIER = ("--teacher", "teachers/classifier", "--data", "data/reviews.jsonl")
_LANGUAGE = ("--task", "lm", "--teacher", "teachers/language", "--data", "data/prose.txt")
_FEW = ("--max-samples", "3")
_CUT = ("--max-length", "12", "--shard-documents", "6", "--batch-tokens", "64", "--device", "cpu")

_CACHES: dict[str, tuple[str, ...]] = {
    "reviews": (
        *(*_CLASSIFIER, "--unlabeled", "data/unlabeled.txt", "--views", "1"),
        *("--attention", "mean", "--attention-layers", "1", "--hidden", "pooled,last"),
    ),
    "reviews-plain": (*_CLASSIFIER, "--unlabeled", "none", *_FEW),
    "reviews-zarr": (
        *(*_CLASSIFIER, "--unlabeled", "none", "--format", "zarr"),
        *("--attention", "cls", "--hidden", "0"),
    ),
    "topk": (
        *(*_LANGUAGE, "--top-k", "8", "--unlabeled", "data/unlabeled.txt"),
        *("--unlabeled-max-samples", "3", "--attention", "mean", "--hidden", "last"),
    ),
    "topk-exact": (*_LANGUAGE, "--top-k", "8", "--exact", *_FEW),
    "topk-top-p": (*_LANGUAGE, "--top-k", "16", "--top-p", "0.9", *_FEW),
    "topk-mapped": (
        *(*_LANGUAGE, "--top-k", "8", *_FEW),
        *("--student-tokenizer", "teachers/other", "--align", "map"),
    ),
    "topk-zarr": (*_LANGUAGE, "--top-k", "8", *_FEW, "--format", "zarr"),
    "sampled": (
        *(*_LANGUAGE, "--codec", "sampled", *_FEW),
        *("--num-draws", "6", "--temperatures", "1,2"),
    ),
    "hidden": (*_LANGUAGE, "--codec", "hidden", *_FEW),
    "dense": (*_LANGUAGE, "--codec", "dense", *_FEW),
}

_TRAINING = (
    *("--device", "cpu", "--batch-size", "4", "--max-steps", "6", "--checkpoint-steps", "3"),
    *("--log-steps", "1", "--eval-fraction", "0.2", "--lr", "0.01"),
)
_STUDENT = (
    *("--d-model", "8", "--num-layers", "1", "--expand", "2", "--d-state", "4"),
    *_TRAINING,
)

_RUNS: dict[str, tuple[str, ...]] = {
    "classifier": (
        *("--cache", "caches/reviews", *_STUDENT, "--head-dim", "8"),
        *("--unlabeled-alpha", "0.3", "--conf-power", "1", "--lm-weight", "0.1"),
        *("--pooled-weight", "0.1", "--attention-weight", "0.1", "--hidden-weight", "0.1"),
    ),
    "language": ("--cache", "caches/topk", *_STUDENT, "--head-dim", "8"),
    "mamba1": ("--cache", "caches/reviews-zarr", *_STUDENT, "--arch", "mamba"),
}

CACHES = {
    name: ("cache-teacher", *options, *_CUT, "--out", f"caches/{name}")
    for name, options in _CACHES.items()
}
"""Each cache's command, by its name in `caches/`."""

_CONVERSIONS: dict[str, tuple[str, ...]] = {
    "reviews-plain-to-zarr": ("caches/reviews-plain", "--format", "zarr"),
    "reviews-zarr-to-arrow": ("caches/reviews-zarr", "--format", "arrow"),
    "dense-to-topk": ("caches/dense", "--codec", "topk", "--top-k", "8"),
    "topk-to-smaller": ("caches/topk", "--top-k", "4"),
    "hidden-to-sampled": ("caches/hidden", "--codec", "sampled", "--num-draws", "6"),
}

CONVERSIONS = {
    name: ("convert", cache, f"caches/{name}", *options, "--device", "cpu")
    for name, (cache, *options) in _CONVERSIONS.items()
}
"""Caches made of other caches; of these only the values are kept."""

RUNS = {
    name: ("train-student", *options, "--out", f"runs/{name}") for name, options in _RUNS.items()
}
"""Each run's command, by its name in `runs/`."""

_OTHER = ("--student-tokenizer", "teachers/other", "--align")
_OTHER_RUNS: dict[str, tuple[str, ...]] = {
    "bidirectional": (
        *("--cache", "caches/reviews-zarr", *_STUDENT, "--head-dim", "8", "--bidirectional"),
        *("--pooling", "mean", "--head", "linear", "--divergence", "jsd"),
    ),
    "teacher-states": (
        *("--cache", "caches/reviews", *_STUDENT, "--head-dim", "8"),
        *("--embeddings", "teacher-states", "--embedding-lr-scale", "0.1"),
        *("--transfer-schedule", "staged", "--attention-weight", "1", "--hidden-weight", "1"),
    ),
    "pretrained": (
        *("--cache", "caches/reviews-zarr", *_TRAINING, "--arch", "hf:teachers/classifier"),
        *("--early-stopping", "1"),
    ),
    "pretrained-language": (
        *("--cache", "caches/topk-top-p", *_TRAINING, "--arch", "hf:teachers/language"),
    ),
    "of-exact": ("--cache", "caches/topk-exact", *_STUDENT, "--head-dim", "8"),
    "of-mapped": (
        *("--cache", "caches/topk-mapped", *_STUDENT, "--head-dim", "8"),
        *("--student-tokenizer", "teachers/other"),
    ),
    "of-topk-zarr": ("--cache", "caches/topk-zarr", *_STUDENT, "--arch", "mamba"),
    "of-sampled": ("--cache", "caches/sampled", *_STUDENT, "--head-dim", "8"),
    "of-hidden": ("--cache", "caches/hidden", *_STUDENT, "--head-dim", "8"),
    "of-dense": ("--cache", "caches/dense", *_STUDENT, "--head-dim", "8"),
    "mapped": ("--cache", "caches/topk", *_STUDENT, "--head-dim", "8", *_OTHER, "map"),
    "spans": ("--cache", "caches/topk", *_STUDENT, "--head-dim", "8", *_OTHER, "spans"),
    "projection": ("--cache", "caches/topk", *_STUDENT, "--head-dim", "8", *_OTHER, "projection"),
}

OTHER_RUNS = {
    name: ("train-student", *options, "--out", f"runs/{name}")
    for name, options in _OTHER_RUNS.items()
} | {
    "finetuned": (
        *("finetune-teacher", "--data", "data/reviews.jsonl", "--model", "teachers/classifier"),
        *(*_TRAINING, "--max-length", "12", "--out", "runs/finetuned"),
    )
}
"""Runs of other kinds; of these only the values are kept."""

TEACHERS = {
    name: "teachers/classifier" if name.startswith("reviews") else "teachers/language"
    for name in CACHES
}
"""Where each cache's teacher lies."""

_BESIDE = ("--teacher", "teachers/classifier", "--data", "data/held-out.jsonl")
EVALUATIONS = {
    "classifier": _BESIDE,
    "language": ("--cache", "caches/topk"),
    "mamba1": _BESIDE,
}
"""What each run is evaluated on."""


def evaluation(run: str, figures: str) -> tuple[str, ...]:
    """The command that evaluates a run and writes its figures to this file."""
    how = ("--json", figures, "--latency-lengths", "8", "--device", "cpu")
    return ("evaluate", f"runs/{run}", *EVALUATIONS[run], *how)


UNNAMED = {
    "caches": CACHES["reviews-plain"][:-2],
    "runs": RUNS["mamba1"][:-2],
}
"""Commands without `--out`, by the folder in which they then choose a name themselves."""

STOPPED_AT = 3
"""The step of the checkpoint at which half-done runs stopped."""
HALVES = {name: f"{name}-half-done" for name in ("classifier", "language")}
"""The half-done run of each run, by its name in `runs/`."""


def resumed(run: str) -> tuple[str, ...]:
    """The command that goes on with the half-done run of a run."""
    return (*RUNS[run][:-1], f"runs/{HALVES[run]}")
