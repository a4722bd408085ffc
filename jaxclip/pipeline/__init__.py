"""Turns prepared products into batches with tf.data: read, decode, augment, tokenize, batch, shard, resume."""
