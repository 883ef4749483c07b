"""The process that train.py and eval.py are: how it starts, and how it ends.

command_line    flags in, help and wrong usage at once, then the work
exit_codes      errors as one line, and a code for each kind
"""
