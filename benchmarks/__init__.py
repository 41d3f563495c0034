"""Speed, memory and quality beside named baselines of the same run; no part of the installed package."""
