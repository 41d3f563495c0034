import pytest
import torch

from teacher_cache.stages.losses.objective import confidence_weights, top1_log_prob
from tests import reference_losses as reference


@pytest.mark.parametrize("conf_power", [0.0, 0.5, 1.0, 3.0])
def test_is_the_top_probability_to_the_power(conf_power: float) -> None:
    logits = torch.randn(8, 3, dtype=torch.float64)
    expected = [max(reference.softmax(sample)) ** conf_power for sample in logits.tolist()]
    weights = confidence_weights(top1_log_prob(logits), conf_power)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_carries_no_gradient_and_is_wide() -> None:
    logits = torch.randn(8, 3, dtype=torch.bfloat16, requires_grad=True)
    weights = confidence_weights(top1_log_prob(logits), 2.0)
    assert weights.dtype is torch.float32
    assert not weights.requires_grad


def test_refuses_a_negative_power() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        confidence_weights(torch.zeros(1), -1.0)
