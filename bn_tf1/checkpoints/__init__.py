"""Checkpoints of any library: read, named, converted, restored.

    reader_writer, tensor_file     whole checkpoints by name; tensors in pieces, from anybody
    dialects                       the names and shapes of each library
    found_layers, object_names     which batch-norm layers a checkpoint holds
    layer_values                   their numbers
    bank_names                     one set of statistics as several, one of several
    conversion, restore            what users call

Nothing in here judges: what is wrong with a checkpoint the doctor says.
"""
