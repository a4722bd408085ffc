"""Mines incorrect pairs, computes features by single encoders, and completes the data card."""
