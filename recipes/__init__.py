"""Recipes that ship with LoRaQ, run by name (`loraq run quickstart`), and the model that the first one quantizes."""
