"""Checkpoints that survive kills, crashes and full disks, and who may write them.

committing_saver    whole, finite, on the disk, or not at all
safe_saver          the same in anybody's MonitoredTrainingSession
saved_steps         which steps were ever saved
durable_files       files that are whole after a crash
run_lock            one training process for each model directory
"""
