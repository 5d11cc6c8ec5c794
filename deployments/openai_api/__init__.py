"""OpenAI's API: bodies as requests, and answers as bodies and events. The addresses are the gateway's."""
