"""The teacher: load it, know exactly which one it is, run it."""
