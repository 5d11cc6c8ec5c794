"""Prompts: templates as data, rendering with the answers' spans, and token ids with placeholders for images."""
