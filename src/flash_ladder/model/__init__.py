"""The GPT: its blocks, its loss, its weights on disk, and the text it writes."""
