"""What may be set in serve_config.yaml, validated before anything starts."""
