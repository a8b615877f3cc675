"""Text, from where it lies to the batches that training reads: sources, tokenizer, corpus, batches."""
