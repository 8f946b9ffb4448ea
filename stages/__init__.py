"""The seven stages, each a plain function from parameters and input paths to output paths."""
