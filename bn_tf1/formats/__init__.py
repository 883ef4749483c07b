"""Bytes: the wire format of protocol buffers, sorted tables, checksums.

    wire_format      protocol buffers, field by field
    sorted_table     the index of a checkpoint
    tfrecords        records and their frames
    crc32c           the checksum of all of these
    array_files      .npz files of examples
    file_signatures  what else a file is, in plain words

Contract: whatever bytes are read, the memory is bounded and only a `ValueError` can come
of them. Nothing in here knows of batch normalization.
"""
