"""Text to batches: sources -> templates -> tokenizer -> pipeline."""
