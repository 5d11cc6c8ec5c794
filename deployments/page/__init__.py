"""The web page: a program of its own that asks a service as any client does, over HTTP, so it can run anywhere.

Knows Gradio and `llava_core.client`, and nothing of the stages behind the address that it asks.
"""
