"""Experts of a mixture in int8: their weights as codes and scales, and what computes with them."""
