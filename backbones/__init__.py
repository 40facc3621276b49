"""Backbones, a file each, read from top to bottom: point_mae, vit; checkpoint reads their files."""
