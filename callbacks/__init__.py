"""Callbacks that move a schedule's rows: one module per framework."""
