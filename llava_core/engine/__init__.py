"""Generation: requests in, text deltas out, many at once. Knows nothing about HTTP, images or prompt texts."""
