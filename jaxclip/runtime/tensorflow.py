"""TensorFlow without GPUs, which are left to JAX; import `tf` from here."""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
