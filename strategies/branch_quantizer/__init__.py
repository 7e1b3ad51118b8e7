"""Strategies of the stage branch_quantizer: how the branch's factors and their inputs are rounded."""
