"""Positions of tokens: vectors added to them, rotary angles, and relative biases."""
