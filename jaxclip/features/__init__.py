"""Features of pictures and texts: boxes, crops, colours, texture, incorrect pairs, and those that re-rankers read."""
