"""What the student is trained on: divergences, confidence weights and the objective."""
