"""Read and write experts in the formats of other projects."""
