"""Low-rank adapters on plain PEFT: elastic in rank, sparse where their base is, on the integers' grid where it is."""
