"""Corpora, their labels, and the way from a document to a padded batch."""
