"""From somebody's training graph to its inference graph, on protocol buffers alone.

    editable_graph        nodes by name that can be changed
    function_inlining     calls, conditions and loops of functions as plain nodes
    dead_branches         what a constant predicate decides
    inference_mode        the switch between training and inference: found and set
    moving_statistics     layers without a switch: batch statistics become moving ones
    graph_interface       inputs, labels and outputs, as the graph tells them
    extraction            control inputs, cuts at inputs, what the outputs need
    dropout_removal       noise that is for training
    any_batch             batch sizes written into shapes
    freezing              variables become constants
    folding               into the weights of what comes before
    constant_values       what constants decide, and what is affine with them
    native_gradients      TensorFlow's own in the place of ours
    compiled_operations   TensorFlow's own in the place of kernel="compiled"
    formulas              what TensorFlow composes, in the place of one node

No graph is imported into TensorFlow or run.
"""
