"""The language side of a LLaVA: projector, splice, decoder."""
