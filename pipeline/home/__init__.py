"""What is under a home: token folders, runs and receipts, and where each of them is."""
