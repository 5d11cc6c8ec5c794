"""Autoscaling on a cluster that grows and shrinks, and the cold start of one more replica."""
