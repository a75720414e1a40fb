"""The example that ships with the package: a tiny SFT model, preference pairs from it, and what made them."""
