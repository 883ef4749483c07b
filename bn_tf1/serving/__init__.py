"""From a training graph and its checkpoint to a checked model for serving.

graph_sources   what is exported: graph, values, signature
preparing       the graph that is served, made of it by `graphs.rewriting`
checking        what must hold before anything is written
partwise_comparison    two graphs compared, each part given the same values
writing         a model on its place, whole or not at all
exporting       the way from one to the other, in order
new_statistics  recalibration over the examples that are given
isolated_run    foreign graphs run elsewhere, for a limited time
model_formats   frozen, SavedModel, TFLite, ONNX: written and run
model_ends      what goes in and comes out of it
export_error    the error of all of them
"""
