"""Frames: tables, images, labels, class lists, folders, videos, procedural scenes. No network, no Ray."""
