"""The causal convolution: against torch's, across resets, carried on."""

from __future__ import annotations

import torch

from teacher_cache.stages.student.scans.dispatch import causal_conv


def test_equals_conv1d_for_any_length() -> None:
    weight, bias = torch.randn(6, 1, 4), torch.randn(6)
    for length in (1, 2, 3, 4, 20):
        x = torch.randn(2, length, 6)
        padded = torch.nn.functional.pad(x.mT, (3, 0))
        expected = torch.nn.functional.conv1d(padded, weight, bias, groups=6).mT
        one_segment = torch.zeros(2, length, dtype=torch.long)
        for seq_idx in (None, one_segment):
            got = causal_conv(x, weight, bias, seq_idx=seq_idx)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    without = causal_conv(x, weight, None) + bias
    torch.testing.assert_close(without, expected, rtol=0, atol=1e-5)


def test_goes_on_from_the_inputs_before() -> None:
    x, weight, bias = torch.randn(2, 20, 6), torch.randn(6, 1, 4), torch.randn(6)
    seq_idx = torch.tensor([0] * 14 + [1] * 6).expand(2, 20)
    for segments in (None, seq_idx):
        whole = causal_conv(x, weight, bias, seq_idx=segments)
        rest = causal_conv(
            x[:, 12:],
            weight,
            bias,
            seq_idx=None if segments is None else segments[:, 12:],
            initial_state=x[:, 9:12],
        )
        torch.testing.assert_close(rest, whole[:, 12:], rtol=0, atol=1e-5)
