"""Offline: bulk answers, training and evaluation as Ray jobs, and the files that describe a cluster.

Empty so far. Thin wrappers around `llava_core` will live here; nothing here may import `deployments`.
"""
