"""Several workers, on one host or many: data-parallel training with joint statistics.

messages, handshake, liveness    who they are, how they meet, whether they live
own_address                      at which address TensorFlow's server is reached
collectives, joint_moments       what they compute together
sessions, cluster                the session, and `Workers`, which users call
launcher                         python -m bn_tf1 launch
"""
