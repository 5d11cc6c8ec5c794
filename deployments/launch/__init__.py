"""A service on this machine, from its configuration to its end: checks, Ray, Serve, HAProxy, processes."""
