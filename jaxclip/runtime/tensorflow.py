"""TensorFlow restricted to CPUs, so that JAX has the accelerators to itself; import `tf` from here."""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
