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

_STUDENT = (
    *("--device", "cpu", "--d-model", "8", "--num-layers", "1", "--expand", "2", "--d-state", "4"),
    *("--batch-size", "4", "--max-steps", "6", "--checkpoint-steps", "3", "--log-steps", "1"),
    *("--eval-fraction", "0.2", "--lr", "0.01"),
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

RUNS = {
    name: ("train-student", *options, "--out", f"runs/{name}") for name, options in _RUNS.items()
}
"""Each run's command, by its name in `runs/`."""

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


STOPPED_AT = 3
"""The step of the checkpoint at which half-done runs stopped."""
HALVES = {name: f"{name}-half-done" for name in ("classifier", "language")}
"""The half-done run of each run, by its name in `runs/`."""


def resumed(run: str) -> tuple[str, ...]:
    """The command that goes on with the half-done run of a run."""
    return (*RUNS[run][:-1], f"runs/{HALVES[run]}")
