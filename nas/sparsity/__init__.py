"""Weights set to zero: Wanda and SparseGPT layer by layer, and LoSA's shares of zeros and ranks for each layer."""
