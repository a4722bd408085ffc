"""Contrastive losses, as pure functions of embeddings."""
