"""How well a trained model does each way of prompting with frames, on moving shapes, from
pixels.
"""
