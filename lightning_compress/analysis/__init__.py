"""What a model can bear: every technique measured on it, the trade-off, and the files to choose from."""
