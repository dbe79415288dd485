"""The same methods during training, as Lightning callbacks."""
