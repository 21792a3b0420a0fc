"""The number format and its arithmetic. Knows nothing of models."""
