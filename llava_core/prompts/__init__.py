"""Prompts: templates as data, rendering with answer spans, and token ids with placeholders for images."""
