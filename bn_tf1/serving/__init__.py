"""From a training graph and its checkpoint to a checked model for serving.

sources         what is exported: graph, values, signature
exporting       the way from one to the other, in order
checking        what must hold before anything is written
isolated_run    foreign graphs run elsewhere, for a limited time
model_formats   frozen, SavedModel, TFLite, ONNX: written and run
"""
