"""Optima of problems that are small enough to be solved: a table of logits, all data at once, many starts at once."""
