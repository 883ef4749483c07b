"""Statistics over data, as against the moving ones: which of them are off, and how far.

recalibration               `recalibrate`, in a session
recalibrated_checkpoints    in a new checkpoint
imported_graphs             for somebody's .meta file
divergence                  which layer breaks evaluation
measured_layers, probes     which layers, and how a batch's statistics are had
measuring_passes, pooling   over all batches, of any size
variable_cells              variables that are written and put back
"""
