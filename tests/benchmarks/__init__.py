"""Speed, memory and accuracy, side by side with peers and limits, in one run.

python -m tests.benchmarks            # minutes
python -m tests.benchmarks --quick    # under two minutes
"""
