"""What preparation computes from pictures and texts: boxes, crops, geometry, colours, texture, clusters, pairs."""
