"""One YAML file a run; each begins with the command that runs it."""
