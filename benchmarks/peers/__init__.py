"""llava-serve and its peers on one machine; `python -m benchmarks.peers` measures, and writes README's table."""
