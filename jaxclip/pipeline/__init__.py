"""Prepared products into batches, with tf.data on the CPU: read, decode, augment, tokenize, batch, shard, resume."""
