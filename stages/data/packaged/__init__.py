"""Models, tokenizers and texts that lie in packages: what the demo and the tests read."""
