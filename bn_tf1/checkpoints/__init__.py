"""Checkpoints of any library: read, named, converted, restored.

    reader_writer                  whole checkpoints by name, those of the first format (V1), too
    tensor_file                    tensors in pieces, of hostile files from anybody
    dialects                       the names and shapes of each library
    found_layers, object_names     which batch-norm layers a checkpoint holds
    layer_values                   their numbers
    bank_names                     one set of statistics as several, one of several
    conversion, restore            what users call

Nothing in here judges: what is wrong with a checkpoint the doctor says.
"""
