"""Speed, memory and quality beside named baselines of the same run; not installed."""
