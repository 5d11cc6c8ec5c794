"""A process of one stage on its machine: its share of the cores, its device, its own part of a checkpoint."""
