"""One layer's part of a transformers cache: what incremental decoding carries on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache


class LayerState:
    """The inputs that the convolution still reaches and the scan's state: constant in the length.

    Args:
        cache: of the whole model, with a linear-attention layer at `layer_idx`.
        layer_idx: of the layer.
    """

    def __init__(self, cache: Cache, layer_idx: int):
        self._cache = cache
        self._layer_idx = layer_idx

    @property
    def convolution(self) -> Tensor | None:
        """[B, W - 1, D] inputs of the convolution before the next position; none at the start."""
        return self._layer.conv_states[0].mT if self._has_begun else None

    @property
    def scan(self) -> Tensor | None:
        """The scan's state before the next position; none at the start."""
        return self._layer.recurrent_states[0] if self._has_begun else None

    @property
    def _layer(self) -> Any:  # the class that transformers takes for linear attention
        return self._cache.layers[self._layer_idx]

    @property
    def _has_begun(self) -> bool:
        return self._layer.has_previous_state[0]  # a reset cache keeps its tensors

    def update(self, conv_inputs: Tensor, scan_state: Tensor, *, reach: int) -> None:
        """Move on behind the positions that were just computed.

        Args:
            conv_inputs: [B, S, D], of the positions just computed.
            scan_state: after the last of them.
            reach: W - 1, earlier inputs that the convolution sees.
        """
        # The convolution's state comes last: it marks the layer as one that has begun.
        self._cache.update_recurrent_state(scan_state.detach(), self._layer_idx)
        self._cache.update_conv_state(
            conv_inputs.detach().mT, self._layer_idx, conv_kernel_size=reach
        )
