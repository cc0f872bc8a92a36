"""The verbs: config in, stages run in order, receipts and words for a person out."""
