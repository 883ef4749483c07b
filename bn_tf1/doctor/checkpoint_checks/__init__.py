"""Checks of one checkpoint: its numbers, what it lacks, its bytes.

numbers             what the statistics, gamma and beta are
presence            what is in it and what is not
whole_checkpoint    all of them, with the graph beside it
"""
