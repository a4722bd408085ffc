"""TensorFlow as this room's modules take it: on CPUs, so that accelerators are left to JAX."""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
