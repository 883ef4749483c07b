"""What is wrong with the batch norm in somebody's graph, checkpoint or training run.

    register             every check: name, gravity, what, why, remedy
    findings             what every check returns
    lint                 all checks of a graph
    graph_checks/        what they look at: updates, modes, settings
    checkpoint_checks/   numbers, what is missing, the file as a whole
    train_directories/   the files of a run, their history, its events
    examination          one path of any kind, a run among them; `audit` for programs
    layer_rows           its layers, as the reports show them
    training_lint        what a train op warns of; `make_train_op` for programs
    statistics_watch     a training of any library, watched while it runs
    reports/             an examination on a terminal, as a page, for programs

What judges is here; what only reads is in `checkpoints` and `graphs`.
"""
