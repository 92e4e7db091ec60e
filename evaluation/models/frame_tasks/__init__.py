"""Success rates of a model in generation from known frames, measured on moving shapes."""
