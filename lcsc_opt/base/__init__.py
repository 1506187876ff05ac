"""What every room uses: errors, files, settings."""
