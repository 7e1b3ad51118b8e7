"""Strategies of the stage main_quantizer: how the residual weight and the layer's input are rounded."""
