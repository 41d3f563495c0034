"""How a language-model teacher's distributions are stored: one module a codec, one interface."""
