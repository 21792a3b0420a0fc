"""Two tiers of memory for a mixture of experts."""
