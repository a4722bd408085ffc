"""Mines incorrect pairs, computes features for mining with separate encoders, and completes the data card."""
