"""Graphs of any library: read, recognised, rewritten.

    reading/           graph files, parsed node by node
    view, node_values  what is asked of a graph's nodes and edges
    recognition/       where something is normalised over the batch
    layer_analysis     layers: normalisations, their variables, mode and updates
    update_operations, training_nodes, facts    what trains them
    rewriting/         from a training graph to its inference graph
    migrate            makes a graph of 1.15 importable on TensorFlow 2

No graph is imported into TensorFlow or run.
"""
