"""Graph files, read without importing or running what is in them.

graph_files        which kind of file, and its protocol buffers
partial_parsing    nodes parsed when they are asked for
text_graphs        the text format
"""
