"""Supervised training: conversations in LLaVA's JSON to labelled examples, and the two stages of LLaVA."""
