"""A run becomes a folder that stands alone. From it the model is evaluated again, on the training's backend and on eager."""
