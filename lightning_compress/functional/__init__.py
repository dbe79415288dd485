"""Pure functions on tensors, arrays and bytes; nothing here knows of `nn.Module`."""
