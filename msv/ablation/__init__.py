"""Ablation grids: expand them, run their cells, keep records, and make tables from the records."""
