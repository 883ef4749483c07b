"""Checks of a training directory: its files, and its checkpoints one after the other."""
