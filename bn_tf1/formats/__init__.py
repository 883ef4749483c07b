"""Bytes: the wire format of protocol buffers, sorted tables, checksums.

Contract: whatever bytes are read, the memory is bounded and only a `ValueError` can come
of them. Nothing in here knows of batch normalization.
"""
