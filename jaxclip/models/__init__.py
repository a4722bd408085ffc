"""The networks as flax.nnx modules: functions of arrays, without data loading or training."""
