"""Configurations of other trainers, read and told in our keys."""
