"""What a student matches of its teacher's inside: attention maps and hidden states."""
