"""TensorFlow as it is taken everywhere here: on CPUs, so that accelerators are left to JAX."""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
