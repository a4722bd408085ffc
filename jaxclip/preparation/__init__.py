"""Mined pairs, single encoders and sections of the data card."""
