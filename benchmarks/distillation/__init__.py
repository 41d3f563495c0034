"""The parts of the quality benchmark: what each ingredient of distillation gives a student."""
