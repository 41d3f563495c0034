"""What is computed: corpora, teacher, join, student, losses, training, and one `run(config)` a stage."""
