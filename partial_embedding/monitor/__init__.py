"""Seen: what rows do in training, measured on a sample, kept in a record, shown on a page."""
