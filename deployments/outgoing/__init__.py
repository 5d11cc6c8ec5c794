"""Connections that the service makes because a request says so: which are allowed, and what is read from them."""
