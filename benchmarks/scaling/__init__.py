"""Autoscaling on a cluster that grows and shrinks, and what the start of one more replica takes."""
