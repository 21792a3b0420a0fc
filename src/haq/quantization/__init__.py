"""From float weights to int8 weights: text, scales, Hessian, rounding, block after block."""
