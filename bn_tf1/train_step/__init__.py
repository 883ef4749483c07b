"""What one training step runs, and in which order.

train_op        `make_train_op`: the updates, then the gradients
joint_updates   one update of a layer by several batches: of several calls, or steps
accumulation    gradients and batches of several steps for one update
"""

from bn_tf1.train_step.train_op import make_train_op

__all__ = ["make_train_op"]
