"""Other libraries' 4-bit quantizers as LoRaQ's strategies: their codes, kept exactly in a number format of LoRaQ.

So `loraq run`, `evaluate` and `bench` treat them as any recipe: the same layers, the same count of bytes, the same
rounding of activations, the same pictures. The libraries are called, and a wrapper only unpacks what they made.
"""
