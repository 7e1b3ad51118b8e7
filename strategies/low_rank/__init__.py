"""Strategies of the stage low_rank: how the branch that makes up for the main quantizer's error is found."""
