"""What differs between training methods."""
