"""Limits that the running service must keep, one workload per file; run with `python -m benchmarks.service WORK`."""
