"""From one cache to another: formats exactly, codecs where the cache holds what they keep."""
