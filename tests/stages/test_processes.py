"""Who trains on what, and what one process does for all."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.stages import processes
from teacher_cache.stages.processes import outcome_of_main, share_of


def batch_of(size: int) -> dict[str, torch.Tensor]:
    number = torch.arange(1, size + 1)
    return {
        "input_ids": number[:, None].expand(-1, 3),
        "attention_mask": torch.ones(size, 3),
        "labels": number,
        "teacher_logits": number[:, None] / 2,
    }


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_the_shares_are_the_batch(size: int, num_processes: int) -> None:
    batch = batch_of(size)
    shares = [
        share_of(batch, rank=rank, num_processes=num_processes) for rank in range(num_processes)
    ]
    together = torch.cat([share["labels"] for share in shares])
    assert sorted(together.tolist()) == batch["labels"].tolist()
    for share in shares:
        num = len(share["labels"])
        assert len(share["teacher_logits"]) == num
        assert len(share["input_ids"]) == len(share["attention_mask"]) == max(1, num)
        assert share["input_ids"][:num, 0].tolist() == share["labels"].tolist()
        assert num or share["input_ids"].tolist() == [[1, 1, 1]]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # somebody else's
    found = (processes.num_processes(), processes.num_local_processes(), processes.rank())
    assert found == (1, 1, 0)
    assert processes.is_main()
    assert outcome_of_main(lambda: 3) == 3
