"""How a person runs it: command line, configuration, presets, progress, tables."""
