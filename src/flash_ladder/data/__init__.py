"""Text, from its sources to the batches that training reads: sources, tokenizer, corpus, batches."""
