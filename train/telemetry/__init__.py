"""What a run writes down and what it costs: rows, rates, FLOPs, memory, energy."""
