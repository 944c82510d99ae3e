"""Bytes on the SSD: one sparse file for each object version, and a map of its blocks."""
