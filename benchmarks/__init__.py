"""Ratios to named baselines, each measured in the same run; no part of the installed package."""
