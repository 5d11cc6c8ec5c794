"""The protocol of LLaVA's own controller and workers, for clients and workers that were written for them."""
