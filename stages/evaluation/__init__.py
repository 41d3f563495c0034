"""Students and teachers on documents that they have not seen: quality, size, latency."""
