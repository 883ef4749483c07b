"""Checks of a training directory: its files, and its checkpoints one after the other.

state_file    which checkpoints there are, and which it says there are
history       statistics that stand still or jump
events        NaN in the event files
"""
