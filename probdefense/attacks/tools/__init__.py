"""What attacks share: their border, gradients, selection draws, settling, queries, descents."""
