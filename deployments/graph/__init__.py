"""The deployment graph: how stages are called, which replica gets a call, and what happens when one is lost."""
