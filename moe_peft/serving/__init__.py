"""A trained adapter where people run models: bundle folders, and an OpenAI-compatible server over transformers' own.

Importing this imports nothing: each server has its own libraries.
"""
