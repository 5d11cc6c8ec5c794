"""Checkpoints: which files hold what, key tables between layouts, loading by part with every key accounted for."""
