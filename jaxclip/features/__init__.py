"""Features that preparation computes from pictures and texts: boxes, crops, colours, texture, incorrect pairs."""
