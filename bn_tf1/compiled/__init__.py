"""`kernel="compiled"`: batch normalization in one operation of our own, for CPUs.

    library        where the compiled operation is kept, and how it gets into TensorFlow
    building       compiles it: python -m bn_tf1 build
    kernel         the output of a layer by it, and its gradient
    accuracy       how far it is from float64, beside the recipe
    batch_norm.cc  the operation

Contract: nothing is compiled unless `build` is asked to, nothing else of this package needs
it, and no inference graph contains it. A program that imports a training graph with it calls
`bn_tf1.compiled.load()` first.
"""

from bn_tf1.compiled.kernel import normalize_batch
from bn_tf1.compiled.library import NotBuiltError, is_built, load

__all__ = ["NotBuiltError", "is_built", "load", "normalize_batch"]
