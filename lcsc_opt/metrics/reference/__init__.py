"""The real images that samples are compared with."""
