"""Checks of one checkpoint: its numbers, what it lacks, its bytes."""
