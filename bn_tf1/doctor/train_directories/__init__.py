"""Checks of a training directory: its files, and its checkpoints one after the other.

directory     the newest checkpoint and graph, and the history
state_file    which checkpoints there are, and which it says there are
history       statistics that stand still or jump
events        NaN in the event files
"""
