"""Training a language model: settings, the loop, checkpoints, curves."""
