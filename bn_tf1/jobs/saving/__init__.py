"""Checkpoints that survive kills, crashes and full disks, and who may write them."""
