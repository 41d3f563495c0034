"""Matching a teacher's attention maps and hidden states: layers, positions, stages, terms."""
