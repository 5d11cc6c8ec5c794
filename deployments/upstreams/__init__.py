"""Models that other OpenAI-compatible servers answer for."""
