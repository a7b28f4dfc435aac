"""Responses of the policy."""
