"""What a language-model cache's codecs cost and teach: the parts of `benchmarks/codecs.py`."""
