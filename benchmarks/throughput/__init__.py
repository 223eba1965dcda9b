"""What ``benchmarks/train_throughput.py`` is made of: the work, the contenders, the steps in turns, and the table."""
