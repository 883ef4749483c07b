"""What train.py and eval.py are made of.

    config, choices               what can be asked for, and its file
    process/                      how the scripts start and end
    data/                         image files and pipelines
    models, slim_models           networks by name
    network_from_config           from a configuration to a graph
    fine_tuning                   a run that begins with the weights of another
    training, step_loop           the training job and its loop
    saving/                       checkpoints that survive every fault
    evaluation, diagnosis         the evaluation job
    summaries, reporting/         TensorBoard's curves, and the page of a run
    finished/                     a run that is over: recalibrated, exported
    progress, stop_signals, memory_allocator

Nothing in the rest of the library imports these.
"""
