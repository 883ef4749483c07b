"""Checks of a graph: updates, modes, settings."""
