"""The layers that mix positions."""
