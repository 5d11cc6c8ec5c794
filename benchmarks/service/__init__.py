"""What the running service must keep, measured: each file one work; `python -m benchmarks.service WORK` runs it."""
