"""A run becomes a folder that stands alone, and is evaluated again from it: on the backend it was trained with and on eager."""
