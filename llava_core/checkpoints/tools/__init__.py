"""Everything done with checkpoints besides loading them: inspecting, converting, merging, subtracting, writing."""
