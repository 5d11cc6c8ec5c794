"""Checkpoints: which files hold what, key tables between layouts, loading by part with every key accounted for.

What is made of checkpoints is in `tools`, which nothing here imports.
"""
