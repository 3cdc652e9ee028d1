"""Talking to adapters: at a terminal (chat), and for programs (engine, server)."""
