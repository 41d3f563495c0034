"""What is on disk: schema, shards, manifest, reader and writer; no torch, no models."""
