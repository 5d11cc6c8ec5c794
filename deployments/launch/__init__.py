"""A service on this machine, from its configuration to its end: Ray, Serve, HAProxy, processes."""
