"""What is done with a run that is over.

exported_runs        a run as a model for serving
recalibrated_runs    a run with statistics that are computed anew
"""
