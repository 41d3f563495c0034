"""How a shard's fields lie in a file; one module a format."""
