"""What asks a model for the videos to evaluate: the only folder that imports models."""
