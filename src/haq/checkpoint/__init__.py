"""Models on disk: a directory of transformers in the compressed-tensors form "int-quantized"."""
