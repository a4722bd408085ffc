"""Prepared products into batches, with tf.data on the CPU: read, decode, augment, tokenize, batch, shard, resume."""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
