"""Checkpoints of every released format, which must load bit for bit for ever."""
