"""Training from a cache: order of batches, Trainer, checkpoints, metrics, the run's folder."""
