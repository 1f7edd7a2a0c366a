"""Layers: maps from the blocks of an image or disk to slots."""
