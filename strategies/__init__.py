"""Strategies, one folder a stage, one file a strategy. Famous methods are combinations of them:

    RTN         main rtn                                                    (low_rank none)
    SVDQuant    smoothing + main rtn + low_rank svd + branch none (16-bit)  arXiv 2411.05007
    LoRaQ       hadamard + main rtn + low_rank loraq + branch rtn (int8, int6 or int4)  arXiv 2604.18117

Every file has the same skeleton: a note on the method and its source, the frozen attrs class whose fields are its
options, and below it the private steps. Files import the core (`loraq.X`) and nothing of the other rooms.
"""
