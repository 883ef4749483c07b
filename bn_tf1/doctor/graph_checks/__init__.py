"""Checks of a graph: updates, modes, settings.

updates      who runs them, and how often
modes        batch or moving statistics
settings     decay, epsilon, savers, weight decay, biases
importing    can it be imported and run at all
"""
