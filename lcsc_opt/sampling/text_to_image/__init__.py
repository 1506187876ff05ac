"""Text-to-image pipelines of diffusers, and LoRAs in them."""
