"""Who makes which shards of a cache; one module a way of sharing them."""
