"""The wikitext configuration from its command to what its student writes, on a stand-in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import teacher_cache.stages.student  # noqa: F401  (registers the student)
from teacher_cache.pipeline import commands
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import TINY_STUDENT, done, pipe, refused
from tests.stand_ins import write_wikitext
from tests.tiny_models import write_tiny_language_model

MAX_LENGTH = 24


@dataclass(frozen=True, kw_only=True)
class Journey:
    """A whole run.

    Attributes:
        command: what was typed.
        interrupted: exit code and standard error of the first try, stopped before the training.
        printed: standard output of the second.
        evaluation: what it wrote.
    """

    command: list[str]
    interrupted: tuple[int, str]
    printed: str
    data: Path
    teacher: Path
    cache: Path
    run: Path
    evaluation: dict[str, Any]


@pytest.fixture(scope="module")
def journey(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Iterator[Journey]:
    folder = tmp_path_factory.mktemp("journey")
    data = write_wikitext(folder / "wikitext-2-raw-v1")
    teacher = write_tiny_language_model(folder / "teacher", gpt2_tokenizer)
    command = ["run", "--config", "wikitext"]
    text = (Path(__file__).parents[2] / "configs" / "wikitext.yaml").read_text()
    for setting in re.findall(r"--set (\S+)", text):
        own = setting.replace("/path/to/wikitext-2-raw-v1", str(data))
        command += ["--set", own.replace("/path/to/gpt2", str(teacher))]
    shape = dict(zip(TINY_STUDENT[::2], TINY_STUDENT[1::2], strict=True))
    for name, value in (shape | {"--eval-fraction": "0.4", "--max-steps": "4"}).items():
        command += ["--set", f"train_student.{name[2:].replace('-', '_')}={value}"]
    command += ["--set", f"cache_teacher.max_length={MAX_LENGTH}"]
    command += ["--set", "evaluate.latency_lengths=[8]"]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        with monkeypatch.context() as stopping:
            stopping.setattr(commands, "train_student", stop)
            first = pipe(*command)
        printed = done(*command)
        (cache,), (run,) = (folder / "caches").iterdir(), (folder / "runs").glob("*/")
        (file,) = (folder / "runs").glob("*.json")
        yield Journey(
            command=command,
            interrupted=(first.code, first.stderr),
            printed=printed,
            data=data,
            teacher=teacher,
            cache=cache,
            run=run,
            evaluation=json.loads(file.read_text()),
        )


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_goes_on_where_it_stopped(journey: Journey) -> None:
    code, said = journey.interrupted
    assert code == 130 and said.endswith("interrupted\n")
    assert "0 shards computed, 1 kept" in journey.printed
    assert "✓ student trained" in journey.printed
    again = done(*journey.command)
    assert "0 shards computed, 1 kept" in again and "was trained before" in again


def test_figures_are_those_of_one_document_at_a_time(
    journey: Journey, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher, student = loaded(journey.teacher), loaded(journey.run)
    corpus = load_corpus(
        CorpusConfig(source=str(journey.data), split="test", labeled=False, txt_unit="article")
    )
    sums = {"teacher": 0.0, "student": 0.0, "kl": 0.0, "agreement": 0.0}
    num = num_bytes = 0
    for document in corpus.documents(0, len(corpus)):
        ids = [*gpt2_tokenizer(document.text)["input_ids"], gpt2_tokenizer.eos_token_id]
        num_bytes += len(document.text.encode())
        for start in range(0, len(ids), MAX_LENGTH):
            piece = ids[start : start + MAX_LENGTH]
            if piece[0] != gpt2_tokenizer.eos_token_id:  # which stands for no text
                num_bytes -= len(
                    str(gpt2_tokenizer.decode(piece[:1])).encode()
                )  # nothing predicts it
            p, q = log_probs(teacher, piece)[:-1], log_probs(student, piece)[:-1]
            following = torch.tensor(piece[1:])[:, None]
            sums["teacher"] -= float(p.gather(1, following).sum())
            sums["student"] -= float(q.gather(1, following).sum())
            sums["kl"] += float((p.exp() * (p - q)).sum())
            sums["agreement"] += int((p.argmax(1) == q.argmax(1)).sum())
            num += len(piece) - 1
    of_teacher, of_student = journey.evaluation["rows"]
    assert (of_teacher["name"], of_student["name"]) == ("teacher", journey.run.name)
    assert of_student["num_positions"] == num
    assert of_student["nll"] == pytest.approx(sums["student"] / num, rel=1e-5)
    assert of_student["perplexity"] == pytest.approx(math.exp(sums["student"] / num), rel=1e-4)
    assert of_student["kl"] == pytest.approx(sums["kl"] / num, rel=1e-3)
    assert of_student["agreement"] == pytest.approx(sums["agreement"] / num)
    for name, row in (("teacher", of_teacher), ("student", of_student)):
        assert row["bits_per_byte"] == pytest.approx(sums[name] / math.log(2) / num_bytes)
        assert row["latency_ms"].keys() == {"8"}
        assert row["num_parameters"] == sum(
            one.numel() for one in (teacher if name == "teacher" else student).parameters()
        )
    assert journey.evaluation["num_documents"] == 2 and journey.evaluation["marks"] == {}
    for shown in ("perplexity", "bits a byte", "│ teacher ", "│ student ", "ms at 8"):
        assert shown in journey.printed
    assert f"student: {journey.evaluation['prompt']}|{of_student['written']}" in journey.printed


def test_on_its_own_cache_it_reads_what_the_training_held_out(
    journey: Journey, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    done(
        *("evaluate", journey.run, "--cache", journey.cache, "--latency-lengths", "8"),
        *("--json", figures),
    )
    teacher, student = json.loads(figures.read_text())["rows"]
    trained = (read_run(journey.run).result or {})["evaluation"]
    for name in ("perplexity", "kl", "agreement"):
        assert student[name] == pytest.approx(trained[f"eval_{name}"], rel=1e-4)
    assert teacher["perplexity"] == pytest.approx(trained["eval_teacher_perplexity"], rel=1e-4)
    assert (teacher["kl"], teacher["num_parameters"], teacher["written"]) == (None, None, None)


def test_writes_the_most_probable_tokens_behind_a_text(
    journey: Journey, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "Emma is a novel"
    model = loaded(journey.run)
    ids = gpt2_tokenizer(text)["input_ids"]
    for _ in range(4):
        ids = [*ids, int(log_probs(model, ids)[-1].argmax())]
    expected = gpt2_tokenizer.decode(ids)
    flags = ("predict", journey.run, "--max-new-tokens", "4")
    assert done(*flags, text) == f"{expected}\n"
    lines = done(*flags, text=f"{text}\nShe\n").splitlines()
    assert json.loads(lines[0]) == expected and len(lines) == 2


def test_draws_depend_on_the_seed_alone(journey: Journey) -> None:
    flags = ("predict", journey.run, "Emma is", "--max-new-tokens", "8", "--do-sample")
    one, same, other = (done(*flags, "--seed", seed) for seed in ("1", "1", "2"))
    assert one == same != other
    cold = done(*flags, "--temperature", "1e-6", "--seed", "1")
    assert cold == done(*flags[:-1])  # the most probable token


def test_what_has_no_meaning_is_refused(journey: Journey, tmp_path: Path) -> None:
    run = journey.run
    refused("predict", run, "a", "--seed", "1", saying="--seed is of --do-sample")
    refused("predict", run, "a", "--temperature", "2", saying="--temperature is of --do-sample")
    refused("predict", run, " ", saying="1 of 1 texts are empty")
    refused("evaluate", run, saying="evaluate needs --data, text that .* or --cache")
    refused(
        *("evaluate", run, "--cache", journey.cache, "--teacher", journey.teacher),
        saying="is run over text, and --cache has what the teacher said",
    )
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    record = json.loads((run / "run.json").read_text())
    del record["settings"]["task"]
    (classifier / "run.json").write_text(json.dumps(record))
    refused(
        *("predict", classifier, "a", "--max-new-tokens", "4"),
        saying="--max-new-tokens is of language models, and .* is a classifier",
    )
    refused(
        *("evaluate", run, classifier, "--data", journey.data),
        saying="is a language model and .* a classifier: compare models of one task",
    )
