"""The mixers' matrices: times the scan's input they are the scan's output."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from teacher_cache.stages.student import mixing_matrices
from teacher_cache.stages.student.mixers import Layout, Mamba, Mamba2, reversed_positions
from teacher_cache.stages.student.mixing_matrices import (
    chosen_units,
    mean_absolute_mixing,
    num_units,
)
from teacher_cache.stages.student.scans import dispatch
from teacher_cache.stages.student.scans.recorded import RecordedMixer, RecordedScan, Scanned
from tests.largest_tensor import LargestTensor
from tests.tiny_students import small_mixer, small_student

ARCHITECTURES = ("mamba", "mamba2")


class Scan(NamedTuple):
    """A call of a scan: its input and output, the direct path taken off."""

    x: Tensor
    y: Tensor


def run(
    module: Mamba | Mamba2, hidden: Tensor, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> tuple[RecordedMixer, list[Scan]]:
    """A forward pass: what it recorded, and its scans' inputs and outputs, [B, S, U, P]."""
    scans: list[Scan] = []
    name = "ssd" if isinstance(module, Mamba2) else "selective"
    real = getattr(dispatch, name)

    def spy(x: Tensor, *args: Any, D: Tensor, **kwargs: Any) -> Scanned:
        scanned = real(x, *args, D=D, **kwargs)
        wide = x.ndim == 4
        direct = x * (D[:, None] if wide else D)
        y = scanned.y - direct
        scans.append(Scan(x if wide else x[..., None], y if wide else y[..., None]))
        return scanned

    record: list[RecordedMixer] = []
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, name, spy)
        module(hidden, layout, None, record)
    return record[0], scans


def times(matrices: Tensor, x: Tensor) -> Tensor:
    """[B, U, S, S] and [B, S, U, P]: [B, S, U, P]."""
    return torch.einsum("buij,bjup->biup", matrices, x)


def packed(*lengths: int) -> Tensor:
    """[1, S]: documents of these lengths; numbers come back, as ours may."""
    return torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)])[None]


def both_ways(mask: Tensor, seq_idx: Tensor | None = None) -> Layout:
    return Layout(mask=mask, seq_idx=seq_idx, reversed_positions=reversed_positions(mask))


def random_hidden(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, length, 8, generator=generator, dtype=torch.float64).to(dtype)


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"dt_rank": 2}),
    "mamba2": ("mamba2", {}),
    "mamba2 in groups": ("mamba2", {"ngroups": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_times_the_input_it_is_the_scans_output(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, changes = SHAPES[shape]
    module = small_mixer(arch, **changes).to(dtype)
    recorded, (scan,) = run(module, random_hidden(3, 40, dtype), Layout(), monkeypatch)
    matrices = mixing_matrices.mixing_matrices(recorded)
    assert matrices.dtype == dtype and matrices.shape[:2] == (3, num_units(recorded))
    torch.testing.assert_close(
        times(matrices, scan.x), scan.y, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )
    assert (matrices.triu(1) == 0).all() and (matrices.tril() != 0).any()
    assert scan.y.abs().max() > 1e-2  # or the comparison means nothing


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_do_not_see_each_other(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, changes = SHAPES[shape]
    module, lengths = small_mixer(arch, **changes), (2, 19, 1, 21)
    seq_idx = packed(*lengths)
    hidden = random_hidden(1, 43)
    recorded, (scan,) = run(module, hidden, Layout(seq_idx=seq_idx), monkeypatch)
    matrices = mixing_matrices.mixing_matrices(recorded)
    torch.testing.assert_close(times(matrices, scan.x), scan.y, rtol=0, atol=1e-12)
    start, blocks = 0, torch.zeros_like(matrices)
    for length in lengths:
        span = slice(start, start + length)
        alone, _ = run(module, hidden[:, span], Layout(), monkeypatch)
        blocks[:, :, span, span] = mixing_matrices.mixing_matrices(alone)
        start += length
    torch.testing.assert_close(matrices, blocks, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bidirectional_mixers_is_that_of_both_scans(
    shape: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, changes = SHAPES[shape]
    module = small_mixer(arch, bidirectional=True, **changes)
    num_real = torch.tensor([24, 9, 1])
    mask = torch.arange(24) < num_real[:, None]
    seq_idx = packed(5, 1, 12, 6).expand(3, -1) if is_packed else None
    layout = both_ways(mask, seq_idx)
    recorded, scans = run(module, random_hidden(3, 24), layout, monkeypatch)
    matrices = mixing_matrices.mixing_matrices(recorded)
    forwards, backwards = scans
    total = forwards.y + layout.reverse(backwards.y)
    # The two directions have inputs of their own (convolutions of their own), so each by itself.
    one_way = RecordedMixer(recorded.forwards)
    first = mixing_matrices.mixing_matrices(one_way)
    second = matrices - first
    found = times(first, forwards.x) + times(second, layout.reverse(backwards.x))
    real = mask[..., None, None]
    torch.testing.assert_close(found * real, total * real, rtol=0, atol=1e-12)
    second = second * mask[:, None, :, None]
    assert (second.tril(-1).abs() < 1e-15).all() and (second.triu(1) != 0).any()
    pairs = mask[:, :, None] & mask[:, None, :]
    outside = matrices.masked_fill(pairs[:, None], 0)
    assert not (outside * mask[:, None, :, None]).any()  # a real row sees no padding


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_on_the_right_changes_nothing(
    arch: str, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small_mixer(arch, bidirectional=bidirectional)
    hidden, length = random_hidden(1, 17), 11
    mask = torch.arange(17)[None] < length
    padded, _ = run(
        module, hidden, both_ways(mask) if bidirectional else Layout(mask=mask), monkeypatch
    )
    short = torch.ones(1, length, dtype=torch.bool)
    alone, _ = run(
        module, hidden[:, :length], both_ways(short) if bidirectional else Layout(), monkeypatch
    )
    torch.testing.assert_close(
        mixing_matrices.mixing_matrices(padded)[:, :, :length, :length],
        mixing_matrices.mixing_matrices(alone),
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("max_entries", [1, 300, 2**22])
def test_the_mean_map_in_blocks_is_the_mean_of_whole_matrices_with_gradients(
    arch: str, bidirectional: bool, max_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small_mixer(arch, bidirectional=bidirectional)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    seq_idx = packed(2, 4, 3).expand(2, -1)
    layout = both_ways(mask, seq_idx) if bidirectional else Layout(mask=mask, seq_idx=seq_idx)
    recorded, _ = run(module, random_hidden(2, 9), layout, monkeypatch)
    units = torch.tensor([0, 3, 1])
    rows = torch.tensor([[8, 2, 2], [4, 0, 7]])
    found = mean_absolute_mixing(recorded, units, rows, max_entries=max_entries)
    whole = mixing_matrices.mixing_matrices(recorded)[:, units].abs().mean(1)
    expected = torch.stack([whole[sample, rows[sample]] for sample in range(2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    weight = random_hidden(2, 3)[..., :1] * torch.arange(9)
    outside = ("D", "norm.weight", "out_proj.weight")  # of the matrices
    parameters = [p for name, p in module.named_parameters() if not name.endswith(outside)]
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), parameters, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def scan_of(arch: str, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor) -> Tensor:
    bias = torch.zeros(dt.shape[-1], dtype=dt.dtype)
    scan = RecordedScan(dt=dt, dt_bias=bias, A=A, B=B, C=C, seq_idx=seq_idx)
    return mixing_matrices.mixing_matrices(RecordedMixer(scan))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_to_steps_rates_and_maps(arch: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    maps = (2, 5, 2, 3) if arch == "mamba2" else (2, 5, 3)
    A = draw(4) if arch == "mamba2" else draw(4, 3)
    inputs = (draw(2, 5, 4), A, draw(*maps), draw(*maps))
    seq_idx = packed(3, 2).expand(2, -1)
    assert torch.autograd.gradcheck(
        lambda dt, A, B, C: scan_of(arch, dt, -A.exp(), B, C, seq_idx), inputs
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_reach_the_models_parameters(arch: str, bidirectional: bool) -> None:
    module = small_mixer(
        arch, d_model=2, d_state=2, head_dim=2, dt_rank=1, bidirectional=bidirectional
    )
    hidden = random_hidden(1, 4)[..., :2]
    layout = both_ways(torch.ones(1, 4, dtype=torch.bool)) if bidirectional else Layout()
    names = [n for n, _ in module.named_parameters() if "A_log" in n or "dt" in n or "proj" in n]
    values = [module.get_parameter(name).detach().requires_grad_() for name in names]

    def matrices(*changed: Tensor) -> Tensor:
        record: list[RecordedMixer] = []
        arguments = (hidden, layout, None, record)
        torch.func.functional_call(module, dict(zip(names, changed, strict=True)), arguments)
        return mixing_matrices.mixing_matrices(record[0])

    assert torch.autograd.gradcheck(matrices, values)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_strong_decays_and_long_texts_overflow_nowhere(arch: str) -> None:
    """A = -48 over 400 positions of large steps: a cumulated exponent would be about -96,000."""
    length = 400
    generator = torch.Generator().manual_seed(0)
    dt = (5 * torch.rand(1, length, 2, generator=generator)).requires_grad_()
    A = torch.full((2,) if arch == "mamba2" else (2, 3), -48.0, requires_grad=True)
    maps = (1, length, 1, 3) if arch == "mamba2" else (1, length, 3)
    B, C = (torch.randn(*maps, generator=generator).requires_grad_() for _ in range(2))
    found = scan_of(arch, dt, A, B, C, torch.zeros(1, length, dtype=torch.long))
    gradients = torch.autograd.grad(found.square().sum(), (dt, A, B, C))
    assert found.isfinite().all() and all(one.isfinite().all() for one in gradients)
    wide = scan_of(arch, dt.double(), A.double(), B.double(), C.double(), torch.zeros(1, length))
    torch.testing.assert_close(found.double(), wide, rtol=1e-4, atol=1e-6)


def test_late_small_steps_after_a_huge_early_one() -> None:
    """Sums of steps are subtracted: a huge one early must not swallow what comes later."""
    dt = torch.full((1, 30, 1), -3.0)
    dt[:, 2] = 4000.0
    A, maps = torch.tensor([-16.0]), torch.ones(1, 30, 1, 1)
    found = scan_of("mamba2", dt, A, maps, maps, torch.zeros(1, 30))
    steps = torch.nn.functional.softplus(dt.double())[0, :, 0]
    for i, j in ((10, 3), (29, 28), (29, 20)):
        expected = torch.exp(-16 * steps[j + 1 : i + 1].sum()) * steps[j]
        torch.testing.assert_close(found[0, 0, i, j].double(), expected, rtol=1e-4, atol=1e-13)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_channels_are_spread_and_fixed(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, _ = run(small_mixer(arch), random_hidden(1, 3), Layout(), monkeypatch)
    expected = [0, 1, 2, 3] if arch == "mamba2" else [2, 8, 13]
    assert chosen_units(recorded, 3).tolist() == expected
    assert chosen_units(recorded, 99).tolist() == list(range(num_units(recorded)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_memory_is_that_of_a_block(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_mixer(arch).float()
    recorded, _ = run(module, random_hidden(4, 64, torch.float32), Layout(), monkeypatch)
    with LargestTensor() as largest:
        mean_absolute_mixing(recorded, max_entries=2**14).sum().backward()
    assert (
        largest.num_elements <= 4 * 64 * 64
    )  # the result itself; whole matrices: 4 to 48 times that


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_backbone_records_each_layer_on_request_only(arch: str, bidirectional: bool) -> None:
    backbone = small_student(arch=arch, bidirectional=bidirectional).backbone
    ids = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    plain, recorded = backbone(ids), backbone(ids, output_mixers=True)
    assert plain.mixers is None and len(recorded.mixers) == 2
    assert torch.equal(plain.last_hidden_state, recorded.last_hidden_state)
    for mixer in recorded.mixers:
        assert (mixer.backwards is not None) == bidirectional
        assert mean_absolute_mixing(mixer).shape == (2, 6, 6)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_under_autocast_entries_are_in_full_precision(arch: str) -> None:
    backbone = small_student(arch=arch).backbone
    ids = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        mixer = backbone(ids, output_mixers=True).mixers[0]
        inside = mean_absolute_mixing(mixer)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, mean_absolute_mixing(mixer), rtol=0, atol=0)
