"""What is computed: corpora, teacher, join, student, losses, training; `run(config)` a stage."""
