"""lm-eval runs a student's folder as a plain `hf` model, on prose that lies here."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.data.packaged.austen import chapters
from teacher_cache.stages.evaluation import lm_eval as adapter
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig

DOCS = Path(__file__).parents[3] / "docs" / "language-model-student.md"


def documented_task() -> str:
    """The task that the documentation shows."""
    (found,) = re.findall(r"```yaml\n(task: .*?)```", DOCS.read_text(), re.DOTALL)
    return found


def test_bits_a_byte_of_prose(
    austen_dir: Path,
    gpt2_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    novel = (austen_dir / "persuasion.txt").read_text(encoding="utf-8")
    texts = [one for one in chapters(novel)[0].split("\n\n") if 50 < len(one) < 400][:3]
    assert len(texts) == 3
    (tmp_path / "persuasion.jsonl").write_text(
        "".join(f'{{"text": {json.dumps(one)}}}\n' for one in texts)
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "austen.yaml").write_text(documented_task())
    ends = {f"{end}_token_id": getattr(gpt2_tokenizer, f"{end}_token_id") for end in ("bos", "eos")}
    shape = {"d_model": 8, "num_layers": 1, "expand": 2, "d_state": 4, "head_dim": 8}
    config = MambaStudentConfig(vocab_size=len(gpt2_tokenizer), **shape, **ends)
    model = build_language_model(config, seed=0).eval()
    model.save_pretrained(tmp_path / "run")
    gpt2_tokenizer.save_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    arguments = (
        "lm_eval", "--model", "hf", "--model_args", "pretrained=run", "--device", "cpu",
        "--include_path", "tasks", "--tasks", "austen", "--batch_size", "2",
        "--output_path", "found",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(arguments))
    adapter.main()
    (file,) = (tmp_path / "found").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["austen"]

    nll = 0.0
    for text in texts:
        ids = [gpt2_tokenizer.bos_token_id, *gpt2_tokenizer(text)["input_ids"]]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll -= sum(float(log_probs[i, following]) for i, following in enumerate(ids[1:]))
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-4)


def test_without_it_the_way_to_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as raised:
        adapter.main()
    assert raised.value.code == 2
    assert "pip install -c constraints.txt -e" in capsys.readouterr().err
