"""Images to features: published networks, and those of users."""
