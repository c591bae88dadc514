"""Serving: many requests share the forward passes of one model (extra `serve`)."""
