"""The web page: a separate program that asks a service over HTTP like any other client, so it can run anywhere.

Knows Gradio and `llava_core.client`, and nothing of the stages behind the service's address.
"""
