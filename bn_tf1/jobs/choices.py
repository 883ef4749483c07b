"""What can be chosen by name, and what belongs to a choice: data sets and networks.

Contract: nothing in here needs TensorFlow, so that --help and a wrong flag are answered at
once. What the names stand for is in `data.datasets`, `models` and `slim_models`; a test
holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple

IN_MEMORY = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
STREAMED = ("images", "tfrecord")
DATASETS = (*IN_MEMORY, "synthetic", *STREAMED)

# What the features of a record are called by default: as slim's ImageNet has them.
RECORD_IMAGE, RECORD_LABEL = "image/encoded", "image/class/label"

# As `bn_tf1.arguments.CUMULATIVE`.
CUMULATIVE = "cumulative"


class Network(NamedTuple):
    """What a network is trained with by default.

    Attributes:
        learning_rate: at the start, per step, in batches of 64.
        epsilon: what its batch norm adds to the variance.
    """

    learning_rate: float
    epsilon: float = 1e-3


NETWORKS = {
    # What trained best of half, once and twice it; a sigmoid passes on a quarter of a
    # gradient at most.
    "mlp": Network(0.8),
    "convnet": Network(0.1),
    "resnet": Network(0.1),
    # Rates that train from scratch, and fine-tune; the epsilons are slim's.
    "resnet_v1_50": Network(0.02, 1e-5),
    "resnet_v2_50": Network(0.02, 1e-5),
    "mobilenet_v1": Network(0.05),
}
# Those that can be built with the layout NCHW.
CHANNELS_FIRST = ("resnet_v1_50", "resnet_v2_50", "mobilenet_v1")
