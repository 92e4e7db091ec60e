"""From a file to frames, and back."""
