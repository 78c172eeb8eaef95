"""Which requests run next: static batches, iteration-level policies, and what they ask of predicted lengths."""
