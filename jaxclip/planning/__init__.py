"""Training steps compiled for devices that are not here."""
