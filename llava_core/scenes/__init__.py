"""The drawn world of the default model: scenes, pictures, questions about them, and the recipe that trains on them.

Knows nothing about serving. `vocabulary`, `scene`, `draw` and `questions` need no torch; the recipe modules do.
"""
