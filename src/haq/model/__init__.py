"""The only room that knows how transformers lays out a model."""
