"""The core against its peers: training steps, generation, tokenization."""
