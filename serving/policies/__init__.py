"""Which requests run next.

Static batches, iteration-level policies, and what both use of predicted lengths.
"""
