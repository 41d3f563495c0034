"""Pictures for people: attention maps, a student's matrices beside them, curves of a training."""
