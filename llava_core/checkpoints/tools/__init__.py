"""What is done with checkpoints other than loading them: describing, converting, merging, subtracting, writing."""
