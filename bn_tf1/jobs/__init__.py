"""What train.py and eval.py are made of.

    config, command_line          flags, their file, exit codes
    data/                         image files and pipelines
    models, network               from a configuration to a graph
    training, training_run        the training job and its loop
    saving/                       checkpoints that survive every fault
    evaluation, diagnosis         the evaluation job
    progress, stop_signals, allocator

Nothing in the rest of the library imports these.
"""
