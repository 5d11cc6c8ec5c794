"""Offline: bulk answers as Ray jobs, and the files that describe a cluster; training and evaluation will follow.

Thin wrappers around `llava_core`; nothing here may import `deployments`.
"""
