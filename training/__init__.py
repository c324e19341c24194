"""What runs of true size need: weights for an optimizer, checkpoints, going on, a check of a new device."""
