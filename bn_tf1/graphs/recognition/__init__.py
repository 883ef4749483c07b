"""The places of a graph where something is normalised per channel over the batch.

normalizations         all places, by those below
fused_kernels          one operation
arithmetic             several, from 1 / sqrt(variance + epsilon) on
own_layers             those of `bn_tf1`, by the names of their gradients
batch_statistics       what can be a mean or a variance
scaling                the way from the deviation to the data
rectified              whether nothing but a ReLU follows
normalization_match    what is said of a place
"""
