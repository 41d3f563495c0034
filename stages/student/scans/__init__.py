"""The recurrences: what the mixers run along the sequence."""
