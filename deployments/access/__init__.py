"""API keys: who may ask, how much, and from where the service can be reached."""
