"""Checkpoints: which files hold what, key tables between layouts, loading by part with every key accounted for.

Code that inspects or writes checkpoints is in `tools`, which nothing here imports.
"""
