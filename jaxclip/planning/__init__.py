"""Plans of training steps for hardware that this machine does not have."""
