"""The networks, as flax.nnx modules: arrays in, arrays out, no data and no training."""
